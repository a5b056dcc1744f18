"""Coefficients as data, shared by NumPy and PyTorch: Runge–Kutta starts and the published searched solvers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction as Fr


@dataclass(frozen=True)
class ButcherTableau:
    """An explicit Runge–Kutta method: stage times c, stage rows a, weights b; `embedded_b` of an embedded method."""

    c: tuple[Fr, ...]
    a: tuple[tuple[Fr, ...], ...]
    b: tuple[Fr, ...]
    embedded_b: tuple[Fr, ...] = ()

    @property
    def error_weights(self) -> tuple[Fr, ...]:
        """b minus the weights of the embedded method of lower order."""
        return tuple(b - lower for b, lower in zip(self.b, self.embedded_b, strict=True))


HEUN2 = ButcherTableau((Fr(0), Fr(1)), ((), (Fr(1),)), (Fr(1, 2), Fr(1, 2)))
KUTTA3 = ButcherTableau((Fr(0), Fr(1, 2), Fr(1)), ((), (Fr(1, 2),), (Fr(-1), Fr(2))), (Fr(1, 6), Fr(2, 3), Fr(1, 6)))
CLASSIC4 = ButcherTableau(
    (Fr(0), Fr(1, 2), Fr(1, 2), Fr(1)),
    ((), (Fr(1, 2),), (Fr(0), Fr(1, 2)), (Fr(0), Fr(0), Fr(1))),
    (Fr(1, 6), Fr(1, 3), Fr(1, 3), Fr(1, 6)),
)
RUNGE_KUTTA = {2: HEUN2, 3: KUTTA3, 4: CLASSIC4}
"""Starts of the Adams–Bashforth methods, by order."""


DORMAND_PRINCE = ButcherTableau(
    (Fr(0), Fr(1, 5), Fr(3, 10), Fr(4, 5), Fr(8, 9), Fr(1), Fr(1)),
    (
        (),
        (Fr(1, 5),),
        (Fr(3, 40), Fr(9, 40)),
        (Fr(44, 45), Fr(-56, 15), Fr(32, 9)),
        (Fr(19372, 6561), Fr(-25360, 2187), Fr(64448, 6561), Fr(-212, 729)),
        (Fr(9017, 3168), Fr(-355, 33), Fr(46732, 5247), Fr(49, 176), Fr(-5103, 18656)),
        (Fr(35, 384), Fr(0), Fr(500, 1113), Fr(125, 192), Fr(-2187, 6784), Fr(11, 84)),
    ),
    (Fr(35, 384), Fr(0), Fr(500, 1113), Fr(125, 192), Fr(-2187, 6784), Fr(11, 84), Fr(0)),
    (
        Fr(1951, 21600),
        Fr(0),
        Fr(22642, 50085),
        Fr(451, 720),
        Fr(-12231, 42400),
        Fr(649, 6300),
        Fr(1, 60),
    ),
)
"""Order 5 with an embedded order 4 (Dormand & Prince 1980; Shampine's fourth-order weights, as torchdiffeq has)."""
DORMAND_PRINCE_MID = (
    Fr(6025192743, 30085553152) / 2,
    Fr(0),
    Fr(51252292925, 65400821598) / 2,
    Fr(-2691868925, 45128329728) / 2,
    Fr(187940372067, 1594534317056) / 2,
    Fr(-1776094331, 19743644256) / 2,
    Fr(11237099, 235043384) / 2,
)
"""Weights of the point at the middle of a step (Shampine 1986)."""


@dataclass(frozen=True)
class MultistepTable:
    """A searched multistep solver (arXiv 2505.21114).

    Step i moves by Δt_i along Σ_{j<i} c_ij·v_j + (1 − Σ_j c_ij)·v_i; row 0 is a plain Euler step. The last
    `num_refiner_steps`
    velocities are the refiner's, v_i = refiner(x_i, v_{i−1}, t_i) + v_{i−1}; none in the published tables.
    """

    step_sizes: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]
    num_refiner_steps: int = 0


SEARCHED_TABLES = {
    5: MultistepTable(
        (0.0521, 0.1475, 0.2114, 0.2797, 0.3092),
        ((), (-1.26,), (1.38, -2.26), (0.0, 0.0, -0.92), (0.0, 0.0, 0.0, -0.70)),
    ),
    6: MultistepTable(
        (0.0391, 0.0924, 0.1650, 0.2015, 0.2511, 0.2511),
        ((), (-1.22,), (1.12, -2.00), (-0.30, 0.90, -1.56), (0.0, 0.0, 0.0, -0.74), (0.0, 0.0, 0.0, 0.0, -0.62)),
    ),
    7: MultistepTable(
        (0.0387, 0.0748, 0.1030, 0.1537, 0.1840, 0.2340, 0.2117),
        (
            (),
            (-1.11,),
            (1.03, -1.99),
            (0.07, 0.43, -1.57),
            (-0.21, -0.15, 1.53, -2.29),
            (-0.05, 0.07, -0.23, 0.61, -1.33),
            (-0.17, 0.31, -0.41, 0.17, 0.59, -1.31),
        ),
    ),
    8: MultistepTable(
        (0.0071, 0.0613, 0.0780, 0.1163, 0.1421, 0.1880, 0.2077, 0.1996),
        (
            (),
            (-2.43,),
            (0.61, -1.55),
            (0.99, -0.11, -2.07),
            (0.05, -0.49, 1.33, -1.93),
            (0.05, -0.33, 0.23, 0.73, -1.71),
            (-0.09, 0.25, -0.29, 0.05, 0.61, -1.45),
            (-0.23, 0.21, -0.01, -0.25, 0.25, 0.41, -1.25),
        ),
    ),
    9: MultistepTable(
        (0.0017, 0.0510, 0.0636, 0.0911, 0.1007, 0.1443, 0.1694, 0.1910, 0.1872),
        (
            (),
            (-6.19,),
            (-0.11, -0.81),
            (0.73, -0.17, -1.37),
            (0.31, -0.05, 0.19, -1.45),
            (0.03, -0.23, 0.29, 0.35, -1.35),
            (-0.19, 0.05, 0.01, 0.21, 0.25, -1.23),
            (-0.23, 0.21, -0.13, 0.17, 0.09, 0.09, -1.09),
            (-0.17, 0.15, 0.11, -0.19, 0.03, 0.23, 0.17, -1.21),
        ),
    ),
    10: MultistepTable(
        (0.0016, 0.0538, 0.0347, 0.0853, 0.0853, 0.1198, 0.1351, 0.1650, 0.1788, 0.1406),
        (
            (),
            (-7.8801,),
            (-0.40, -0.74),
            (0.48, -0.18, -0.86),
            (0.26, -0.04, -0.04, -1.28),
            (0.0, -0.06, 0.26, 0.26, -1.42),
            (-0.10, -0.06, 0.08, 0.20, 0.22, -1.24),
            (-0.18, 0.14, -0.08, 0.10, 0.08, 0.14, -1.06),
            (-0.12, 0.16, -0.10, 0.04, 0.08, 0.06, 0.08, -1.02),
            (-0.16, 0.02, 0.14, 0.0, -0.14, 0.08, 0.14, 0.34, -1.38),
        ),
    ),
}
"""The published tables by number of evaluations, as printed (MCG-NJU/NeuralSolver)."""
