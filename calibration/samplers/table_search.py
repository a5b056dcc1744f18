"""Searches a multistep table for a model by gradient: its step lengths and coefficients, against fine trajectories.

The family is that of arXiv 2505.21114 (`tableaus.SearchedTable`): step i goes along a combination of all slopes
so far. Here the last evaluations may be the velocity refiner's. Everything is measured on guided trajectories of the
model itself, and seeds that the search never saw decide whether its table is better than the one it began with.

Letters: B images, N rows, C latent channels, H = W latent side, E evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.samplers.probe import FIT_SEED, HELD_OUT_SEED
from flowturbo.evaluation.quality.array_cache import load_arrays, save_arrays
from flowturbo.models.sit import SiT
from flowturbo.torch_sampler import build_guided_velocity
from runtime.sampling.blocks import MAX_REFINER_STEP
from runtime.sampling.calibrated import MAX_TABLE_STEPS
from runtime.sampling.grids import build_grid_from_steps
from runtime.sampling.guidance import GuidanceInterval, build_class_branches
from runtime.sampling.noise import sample_noise
from runtime.sampling.plan import integrate
from runtime.sampling.solvers import SOLVERS
from runtime.sampling.tableaus import SEARCHED_TABLES, MultistepTable
from runtime.system.errors import RequestError

Say = Callable[[str], None]
SELECT_SEED = FIT_SEED + 500_000
"""First seed of the images that choose among the tables met on the way."""


@dataclass(frozen=True)
class SearchConfig:
    """What is searched and how.

    Attributes:
        nfe: predictor evaluations.
        refiner_nfe: refiner evaluations after them.
        guidance, channels, interval: how the trajectories are guided.
        images: that the search looks at; half as many choose among the tables on the way, as many again decide.
        batch: images of one step of the search.
        steps: of the search.
        lr: peak learning rate of Adam.
        fine_steps: Heun steps of the trajectories that are aimed at.
        seed: of the order in which images are looked at.
    """

    nfe: int
    refiner_nfe: int = 0
    guidance: float = 1.0
    channels: int = 3
    interval: tuple[float, float] = (0.0, 1.0)
    images: int = 64
    batch: int = 16
    steps: int = 120
    lr: float = 0.03
    fine_steps: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        total = self.nfe + self.refiner_nfe
        if not self.nfe >= 2 or not self.refiner_nfe >= 0 or total > MAX_TABLE_STEPS:
            raise RequestError(
                f"a table of {self.nfe} predictor and {self.refiner_nfe} refiner evaluations",
                allowed=f"at least 2 of the predictor, at most {MAX_TABLE_STEPS} in all (what the history holds)",
            )
        if not 0 < self.lr < 10:
            raise RequestError(f"learning rate {self.lr:g}", allowed="a positive number below 10")
        if min(self.images, self.batch, self.steps, self.fine_steps) < 1 or self.batch > self.images:
            raise RequestError(
                f"{self.images} images, {self.batch} a step, {self.steps} steps, {self.fine_steps} fine steps",
                allowed="at least 1 of each, and no more a step than there are images",
            )


@dataclass(frozen=True)
class NetworkSet:
    """The predictor, its refiner if there is one, and the classes they were trained on."""

    predictor: SiT
    refiner: SiT | None
    classes: Sequence[int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a latent."""
        config = self.predictor.config
        return config.out_channels, config.latent_size, config.latent_size


@dataclass(frozen=True)
class TrajectorySet:
    """Starts and ends of some trajectories: noise and fine latents [B, C, H, W], labels."""

    noise: Tensor
    fine: Tensor
    labels: tuple[int, ...]

    def select(self, positions: NDArray[np.int64]) -> TrajectorySet:
        index = torch.from_numpy(positions)
        return TrajectorySet(self.noise[index], self.fine[index], tuple(self.labels[i] for i in positions))


@dataclass(frozen=True)
class TableSearchResult:
    """A searched table, the one it began with, and their errors on seeds that the search never saw.

    Attributes:
        better_table: which of the two is better there: "searched" or "initial".
        history: (step, loss on the batch, error on the choosing images or None).
    """

    table: MultistepTable
    initial: MultistepTable
    before: float
    after: float
    history: tuple[tuple[int, float, float | None], ...]

    @property
    def better_table(self) -> MultistepTable:
        """The better one."""
        return self.table if self.after < self.before else self.initial


def make_initial_table(nfe: int, refiner_nfe: int = 0) -> MultistepTable:
    """Where a search begins: the published table of as many evaluations, else Adams–Bashforth 2 on a uniform grid.

    With a refiner, the published table of the predictor evaluations is followed by equal short refiner steps.
    """
    if refiner_nfe:
        predictor_table = make_initial_table(nfe)
        tail_step = min(MAX_REFINER_STEP, 1.0 / (nfe + refiner_nfe))
        steps = [h * (1 - tail_step * refiner_nfe) for h in predictor_table.step_sizes] + [tail_step] * refiner_nfe
        coefficients = [*predictor_table.coefficients, *((0.0,) * i for i in range(nfe, nfe + refiner_nfe))]
        return MultistepTable(tuple(steps), tuple(coefficients), refiner_nfe)
    if nfe in SEARCHED_TABLES:
        return SEARCHED_TABLES[nfe]
    coefficients = [(*(0.0,) * (i - 1), -0.5) if i else () for i in range(nfe)]
    return MultistepTable((1.0 / nfe,) * nfe, tuple(coefficients))


class TableParameters:
    """A table as parameters: logits of the step lengths, and the coefficients below the diagonal, float64 [·]."""

    def __init__(self, table: MultistepTable) -> None:
        self.refiner = table.num_refiner_steps
        steps = torch.tensor(table.step_sizes, dtype=torch.float64)
        self.logits = torch.log(steps / steps.sum()).requires_grad_(True)
        flat = [c for row in table.coefficients for c in row]
        self.coefficients = torch.tensor(flat, dtype=torch.float64).requires_grad_(True)

    @property
    def steps(self) -> Tensor:
        """Step lengths [E], which sum to 1."""
        return torch.softmax(self.logits, dim=0)

    def slice_coefficients(self, i: int) -> Tensor:
        """Coefficients of step i over earlier slopes, [i]."""
        start = i * (i - 1) // 2
        return self.coefficients[start : start + i]

    def to_table(self) -> MultistepTable:
        """As plain numbers."""
        steps = tuple(float(h) for h in self.steps.detach())
        coefficients = tuple(tuple(float(c) for c in self.slice_coefficients(i).detach()) for i in range(len(steps)))
        return MultistepTable(steps, coefficients, self.refiner)


class GuidedVelocities:
    """Guided velocities of a batch in PyTorch, differentiable in x and t."""

    def __init__(self, networks: NetworkSet, labels: Sequence[int], config: SearchConfig) -> None:
        self._interval = GuidanceInterval(*config.interval)
        null = networks.predictor.config.classes
        self._branches = {
            guided: build_class_branches(labels, [scale] * len(labels), null, networks.shape[0], config.channels)
            for guided, scale in ((True, config.guidance), (False, 1.0))
        }
        self._networks = networks

    def is_guided(self, t: float) -> bool:
        """Whether guidance acts at t."""
        return self._interval.is_active(t)

    def predict(self, x: Tensor, t: Tensor | float, guided: bool | None = None) -> Tensor:
        """Rows [N, C, H, W], the first B of them the images' velocities; guided as `t` says if not told."""
        guided = self.is_guided(float(t)) if guided is None else guided
        return build_guided_velocity(self._networks.predictor, self._branches[guided])(x, t, None)

    def refine(self, x: Tensor, t: Tensor | float, v: Tensor, guided: bool | None = None) -> Tensor:
        """The same of the refiner, which reads earlier rows."""
        assert self._networks.refiner is not None
        guided = self.is_guided(float(t)) if guided is None else guided
        return build_guided_velocity(self._networks.refiner, self._branches[guided])(x, t, v) + v


def sample_with_table(parameters: TableParameters, velocities: GuidedVelocities, noise: Tensor) -> Tensor:
    """Latents [B, C, H, W] that a table makes, differentiable in its parameters; `solvers.multistep` in PyTorch."""
    steps, x, images = parameters.steps, noise, len(noise)
    num_predictor = len(steps) - parameters.refiner
    guided = [
        velocities.is_guided(t) for t in build_grid_from_steps([float(h) for h in steps.detach()])
    ]  # as they will be deployed
    outputs: list[Tensor] = []
    t = torch.zeros((), dtype=torch.float64)
    for i, h in enumerate(steps):
        is_refined = i >= num_predictor and guided[i - 1] == guided[i]
        is_guided = guided[i]
        outputs.append(
            velocities.refine(x, t, outputs[-1], is_guided) if is_refined else velocities.predict(x, t, is_guided)
        )
        coefficients = parameters.slice_coefficients(i)
        slope = (1 - coefficients.sum()) * outputs[i][:images]
        for j in range(i):
            slope = slope + coefficients[j] * outputs[j][:images]
        x = (x + h * slope).float()
        t = t + h
    return x


def measure_distance(latents: Tensor, fine: Tensor) -> Tensor:
    """Root mean square difference per image, [B]."""
    return (latents - fine).double().square().flatten(1).mean(dim=1).sqrt()


def search_table(
    networks: NetworkSet, config: SearchConfig, partial: Path, say: Say, *, model: str = "", resume: bool = True
) -> TableSearchResult:
    """Searches a table.

    Args:
        partial: file that holds what is known so far; a search that was stopped goes on there.
        model: names the networks; a search of others is not gone on with.
    """
    trajectory_sets = _make_trajectory_sets(networks, config, say)
    initial = make_initial_table(config.nfe, config.refiner_nfe)
    description = f"{model} {_describe_config(config)}"
    state = _SearchState.read(partial, initial, config, description) if resume else None
    state = state or _SearchState(initial, config)
    if state.step:
        say(f"going on at step {state.step} of {config.steps} ({partial})")
    if not state.history:
        state.best_error = _measure_error(networks, config, initial, trajectory_sets["select"])
        say(f"began with {state.best_error:.4f} on the choosing images")
    while state.step < config.steps:
        loss = _take_step(networks, config, state, trajectory_sets["fit"])
        selection_error = None
        if state.step % 10 == 0 or state.step == config.steps:
            table = state.parameters.to_table()
            selection_error = _measure_error(networks, config, table, trajectory_sets["select"])
            if selection_error < state.best_error:
                state.best, state.best_error = table, selection_error
            say(f"step {state.step}/{config.steps}  loss {loss:.4f}  choosing images {selection_error:.4f}")
        state.history.append((state.step, loss, selection_error))
        if selection_error is not None:
            state.write(partial, description)
    before, after = (
        _measure_error(networks, config, table, trajectory_sets["held out"]) for table in (initial, state.best)
    )
    say(f"held-out seeds: {before:.4f} before, {after:.4f} after")
    return TableSearchResult(state.best, initial, before, after, tuple(state.history))


def _make_trajectory_sets(networks: NetworkSet, config: SearchConfig, say: Say) -> dict[str, TrajectorySet]:
    sizes = {"fit": (FIT_SEED, config.images), "select": (SELECT_SEED, max(1, config.images // 2))}
    trajectory_sets = {}
    for name, (first, count) in (sizes | {"held out": (HELD_OUT_SEED, config.images)}).items():
        say(f"fine trajectories of {count} images ({name})")
        trajectory_sets[name] = sample_fine_trajectories(networks, config, first, count)
    return trajectory_sets


def sample_fine_trajectories(networks: NetworkSet, config: SearchConfig, first_seed: int, count: int) -> TrajectorySet:
    """Where a fine Heun run takes the noise of `count` seeds, classes taking turns."""
    labels = tuple(networks.classes[i % len(networks.classes)] for i in range(count))
    noise = torch.from_numpy(sample_noise(range(first_seed, first_seed + count), networks.shape))
    plan = SOLVERS["heun"].plan(tuple(i / config.fine_steps for i in range(config.fine_steps + 1)))
    parts = []
    with torch.no_grad():
        for start in range(0, count, config.batch):
            batch = slice(start, start + config.batch)
            velocities = GuidedVelocities(networks, labels[batch], config)
            parts.append(integrate(plan, noise[batch], velocities.predict))
    return TrajectorySet(noise, torch.cat(parts), labels)


def _measure_error(
    networks: NetworkSet, config: SearchConfig, table: MultistepTable, trajectories: TrajectorySet
) -> float:
    """Mean distance over images."""
    parameters, distances = TableParameters(table), []
    with torch.no_grad():
        for start in range(0, len(trajectories.labels), config.batch):
            batch = trajectories.select(np.arange(start, min(start + config.batch, len(trajectories.labels))))
            velocities = GuidedVelocities(networks, batch.labels, config)
            distances.append(measure_distance(sample_with_table(parameters, velocities, batch.noise), batch.fine))
    return float(torch.cat(distances).mean())


def _take_step(networks: NetworkSet, config: SearchConfig, state: _SearchState, trajectories: TrajectorySet) -> float:
    random = np.random.Generator(np.random.Philox(key=[config.seed, state.step]))
    batch = trajectories.select(random.permutation(len(trajectories.labels))[: config.batch])
    velocities = GuidedVelocities(networks, batch.labels, config)
    loss = measure_distance(sample_with_table(state.parameters, velocities, batch.noise), batch.fine).mean()
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([state.parameters.logits, state.parameters.coefficients], 1.0)
    progress = state.step / config.steps
    for group in state.optimizer.param_groups:
        group["lr"] = config.lr * 0.5 * (1 + np.cos(np.pi * progress))
    state.optimizer.step()
    state.step += 1
    return float(loss.detach())


class _SearchState:
    """How far a search is; goes to and from a file of plain arrays."""

    def __init__(self, table: MultistepTable, config: SearchConfig) -> None:
        self.parameters = TableParameters(table)
        self.optimizer = torch.optim.Adam(
            [self.parameters.logits, self.parameters.coefficients], lr=config.lr, betas=(0.9, 0.95)
        )
        self.step = 0
        self.best, self.best_error = table, float("inf")
        self.history: list[tuple[int, float, float | None]] = []

    def write(self, path: Path, description: str) -> None:
        """Keeps everything that the next step depends on."""
        arrays: dict[str, Any] = {
            "config": np.asarray(description),
            "step": np.asarray(self.step),
            "best_error": np.asarray(self.best_error),
            "history": np.asarray([(s, loss, np.nan if c is None else c) for s, loss, c in self.history]),
        }
        coefficients = [c for row in self.best.coefficients for c in row]
        arrays |= {
            "best/steps": np.asarray(self.best.step_sizes),
            "best/coefficients": np.asarray(coefficients, np.float64),
        }
        for name, tensor in self._tensors().items():
            arrays[name] = tensor.detach().numpy()
            for key, value in self.optimizer.state[tensor].items():
                arrays[f"{name}/{key}"] = value.numpy()
        save_arrays(path, arrays)

    @classmethod
    def read(cls, path: Path, table: MultistepTable, config: SearchConfig, description: str) -> _SearchState | None:
        """What a stopped search of the same model and settings left; None where there is nothing that fits."""
        arrays = load_arrays(path)
        if arrays is None or not arrays.keys() >= _STATE_KEYS or str(arrays["config"]) != description:
            return None
        state = cls(table, config)
        state.step = int(arrays["step"])
        state.history = [(int(s), float(loss), None if np.isnan(c) else float(c)) for s, loss, c in arrays["history"]]
        coefficients = iter(arrays["best/coefficients"].tolist())
        best_rows = tuple(tuple(next(coefficients) for _ in range(i)) for i in range(len(table.step_sizes)))
        state.best = MultistepTable(tuple(arrays["best/steps"].tolist()), best_rows, table.num_refiner_steps)
        state.best_error = float(arrays["best_error"])
        with torch.no_grad():
            for name, tensor in state._tensors().items():
                tensor.copy_(torch.from_numpy(arrays[name]))
                state.optimizer.state[tensor] = {
                    key: torch.from_numpy(np.asarray(arrays[f"{name}/{key}"]))
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return state

    def _tensors(self) -> dict[str, Tensor]:
        return {"logits": self.parameters.logits, "coefficients": self.parameters.coefficients}


_STATE_KEYS = {"config", "step", "best_error", "history", "best/steps", "best/coefficients"} | {
    f"{name}{part}" for name in ("logits", "coefficients") for part in ("", "/step", "/exp_avg", "/exp_avg_sq")
}


def _describe_config(config: SearchConfig) -> str:
    """Everything that a search depends on beside its networks, as text."""
    return repr(sorted(asdict(config).items()))
