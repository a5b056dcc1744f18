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

from calibration.samplers.probe import FITTED, HELD_OUT
from flowturbo.evaluation.quality.array_cache import read_kept, write_kept
from flowturbo.models.sit import SiT
from flowturbo.torch_sampler import rows_velocity
from runtime.sampling.blocks import REFINER_STEP
from runtime.sampling.calibrated import MOST_EVALUATIONS
from runtime.sampling.grids import from_steps
from runtime.sampling.guidance import Interval, guided_rows
from runtime.sampling.noise import noise_of_seeds
from runtime.sampling.plan import integrate
from runtime.sampling.solvers import SOLVERS
from runtime.sampling.tableaus import SEARCHED, SearchedTable
from runtime.system.errors import RequestError

Say = Callable[[str], None]
SELECT = FITTED + 500_000
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
        if not self.nfe >= 2 or not self.refiner_nfe >= 0 or total > MOST_EVALUATIONS:
            raise RequestError(
                f"a table of {self.nfe} predictor and {self.refiner_nfe} refiner evaluations",
                allowed=f"at least 2 of the predictor, at most {MOST_EVALUATIONS} in all (what the history holds)",
            )
        if not 0 < self.lr < 10:
            raise RequestError(f"learning rate {self.lr:g}", allowed="a positive number below 10")
        if min(self.images, self.batch, self.steps, self.fine_steps) < 1 or self.batch > self.images:
            raise RequestError(
                f"{self.images} images, {self.batch} a step, {self.steps} steps, {self.fine_steps} fine steps",
                allowed="at least 1 of each, and no more a step than there are images",
            )


@dataclass(frozen=True)
class Networks:
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
class Images:
    """Starts and ends of some trajectories: noise and fine latents [B, C, H, W], labels."""

    noise: Tensor
    fine: Tensor
    labels: tuple[int, ...]

    def part(self, where: NDArray[np.int64]) -> Images:
        index = torch.from_numpy(where)
        return Images(self.noise[index], self.fine[index], tuple(self.labels[i] for i in where))


@dataclass(frozen=True)
class Found:
    """A searched table, the one it began with, and their errors on seeds that the search never saw.

    Attributes:
        kept: which of the two is better there: "searched" or "initial".
        history: (step, loss on the batch, error on the choosing images or None).
    """

    table: SearchedTable
    initial: SearchedTable
    before: float
    after: float
    history: tuple[tuple[int, float, float | None], ...]

    @property
    def kept(self) -> SearchedTable:
        """The better one."""
        return self.table if self.after < self.before else self.initial


def initial_table(nfe: int, refiner_nfe: int = 0) -> SearchedTable:
    """Where a search begins: the published table of as many evaluations, else Adams–Bashforth 2 on a uniform grid.

    With a refiner, the published table of the predictor evaluations is followed by equal short refiner steps.
    """
    if refiner_nfe:
        start = initial_table(nfe)
        tail = min(REFINER_STEP, 1.0 / (nfe + refiner_nfe))
        steps = [h * (1 - tail * refiner_nfe) for h in start.steps] + [tail] * refiner_nfe
        rows = [*start.rows, *((0.0,) * i for i in range(nfe, nfe + refiner_nfe))]
        return SearchedTable(tuple(steps), tuple(rows), refiner_nfe)
    if nfe in SEARCHED:
        return SEARCHED[nfe]
    rows = [(*(0.0,) * (i - 1), -0.5) if i else () for i in range(nfe)]
    return SearchedTable((1.0 / nfe,) * nfe, tuple(rows))


class TableParameters:
    """A table as parameters: logits of the step lengths, and the coefficients below the diagonal, float64 [·]."""

    def __init__(self, table: SearchedTable) -> None:
        self.refiner = table.refiner
        steps = torch.tensor(table.steps, dtype=torch.float64)
        self.logits = torch.log(steps / steps.sum()).requires_grad_(True)
        flat = [c for row in table.rows for c in row]
        self.coefficients = torch.tensor(flat, dtype=torch.float64).requires_grad_(True)

    @property
    def steps(self) -> Tensor:
        """Step lengths [E], which sum to 1."""
        return torch.softmax(self.logits, dim=0)

    def row(self, i: int) -> Tensor:
        """Coefficients of step i over earlier slopes, [i]."""
        start = i * (i - 1) // 2
        return self.coefficients[start : start + i]

    def table(self) -> SearchedTable:
        """As plain numbers."""
        steps = tuple(float(h) for h in self.steps.detach())
        rows = tuple(tuple(float(c) for c in self.row(i).detach()) for i in range(len(steps)))
        return SearchedTable(steps, rows, self.refiner)


class Velocities:
    """Guided velocities of a batch in PyTorch, differentiable in x and t."""

    def __init__(self, networks: Networks, labels: Sequence[int], config: SearchConfig) -> None:
        self._interval = Interval(*config.interval)
        null = networks.predictor.config.classes
        self._rows = {
            guided: guided_rows(labels, [scale] * len(labels), null, networks.shape[0], config.channels)
            for guided, scale in ((True, config.guidance), (False, 1.0))
        }
        self._networks = networks

    def guided(self, t: float) -> bool:
        """Whether guidance acts at t."""
        return self._interval.acts(t)

    def predict(self, x: Tensor, t: Tensor | float, guided: bool | None = None) -> Tensor:
        """Rows [N, C, H, W], the first B of them the images' velocities; guided as `t` says if not told."""
        guided = self.guided(float(t)) if guided is None else guided
        return rows_velocity(self._networks.predictor, self._rows[guided])(x, t, None)

    def refine(self, x: Tensor, t: Tensor | float, v: Tensor, guided: bool | None = None) -> Tensor:
        """The same of the refiner, which reads earlier rows."""
        assert self._networks.refiner is not None
        guided = self.guided(float(t)) if guided is None else guided
        return rows_velocity(self._networks.refiner, self._rows[guided])(x, t, v) + v


def sample(parameters: TableParameters, velocities: Velocities, noise: Tensor) -> Tensor:
    """Latents [B, C, H, W] that a table makes, differentiable in its parameters; `solvers.multistep` in PyTorch."""
    steps, x, images = parameters.steps, noise, len(noise)
    predictor = len(steps) - parameters.refiner
    guided = [velocities.guided(t) for t in from_steps([float(h) for h in steps.detach()])]  # as they will be deployed
    rows: list[Tensor] = []
    t = torch.zeros((), dtype=torch.float64)
    for i, h in enumerate(steps):
        refined = i >= predictor and guided[i - 1] == guided[i]
        kind = guided[i]
        rows.append(velocities.refine(x, t, rows[-1], kind) if refined else velocities.predict(x, t, kind))
        c = parameters.row(i)
        slope = (1 - c.sum()) * rows[i][:images]
        for j in range(i):
            slope = slope + c[j] * rows[j][:images]
        x = (x + h * slope).float()
        t = t + h
    return x


def distance(found: Tensor, fine: Tensor) -> Tensor:
    """Root mean square difference per image, [B]."""
    return (found - fine).double().square().flatten(1).mean(dim=1).sqrt()


def search(
    networks: Networks, config: SearchConfig, partial: Path, say: Say, *, model: str = "", resume: bool = True
) -> Found:
    """Searches a table.

    Args:
        partial: file that holds what is known so far; a search that was stopped goes on there.
        model: names the networks; a search of others is not gone on with.
    """
    sets = _image_sets(networks, config, say)
    initial = initial_table(config.nfe, config.refiner_nfe)
    named = f"{model} {_named(config)}"
    state = _State.read(partial, initial, config, named) if resume else None
    state = state or _State(initial, config)
    if state.step:
        say(f"going on at step {state.step} of {config.steps} ({partial})")
    if not state.history:
        state.best_error = _error(networks, config, initial, sets["select"])
        say(f"began with {state.best_error:.4f} on the choosing images")
    while state.step < config.steps:
        loss = _one_step(networks, config, state, sets["fit"])
        chosen = None
        if state.step % 10 == 0 or state.step == config.steps:
            table = state.parameters.table()
            chosen = _error(networks, config, table, sets["select"])
            if chosen < state.best_error:
                state.best, state.best_error = table, chosen
            say(f"step {state.step}/{config.steps}  loss {loss:.4f}  choosing images {chosen:.4f}")
        state.history.append((state.step, loss, chosen))
        if chosen is not None:
            state.write(partial, named)
    before, after = (_error(networks, config, table, sets["held out"]) for table in (initial, state.best))
    say(f"held-out seeds: {before:.4f} before, {after:.4f} after")
    return Found(state.best, initial, before, after, tuple(state.history))


def _image_sets(networks: Networks, config: SearchConfig, say: Say) -> dict[str, Images]:
    sizes = {"fit": (FITTED, config.images), "select": (SELECT, max(1, config.images // 2))}
    sets = {}
    for name, (first, count) in (sizes | {"held out": (HELD_OUT, config.images)}).items():
        say(f"fine trajectories of {count} images ({name})")
        sets[name] = fine_images(networks, config, first, count)
    return sets


def fine_images(networks: Networks, config: SearchConfig, first_seed: int, count: int) -> Images:
    """Where a fine Heun run takes the noise of `count` seeds, classes taking turns."""
    labels = tuple(networks.classes[i % len(networks.classes)] for i in range(count))
    noise = torch.from_numpy(noise_of_seeds(range(first_seed, first_seed + count), networks.shape))
    plan = SOLVERS["heun"].plan(tuple(i / config.fine_steps for i in range(config.fine_steps + 1)))
    parts = []
    with torch.no_grad():
        for start in range(0, count, config.batch):
            part = slice(start, start + config.batch)
            velocities = Velocities(networks, labels[part], config)
            parts.append(integrate(plan, noise[part], velocities.predict))
    return Images(noise, torch.cat(parts), labels)


def _error(networks: Networks, config: SearchConfig, table: SearchedTable, images: Images) -> float:
    """Mean distance over images."""
    parameters, distances = TableParameters(table), []
    with torch.no_grad():
        for start in range(0, len(images.labels), config.batch):
            part = images.part(np.arange(start, min(start + config.batch, len(images.labels))))
            velocities = Velocities(networks, part.labels, config)
            distances.append(distance(sample(parameters, velocities, part.noise), part.fine))
    return float(torch.cat(distances).mean())


def _one_step(networks: Networks, config: SearchConfig, state: _State, images: Images) -> float:
    random = np.random.Generator(np.random.Philox(key=[config.seed, state.step]))
    part = images.part(random.permutation(len(images.labels))[: config.batch])
    velocities = Velocities(networks, part.labels, config)
    loss = distance(sample(state.parameters, velocities, part.noise), part.fine).mean()
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([state.parameters.logits, state.parameters.coefficients], 1.0)
    share = state.step / config.steps
    for group in state.optimizer.param_groups:
        group["lr"] = config.lr * 0.5 * (1 + np.cos(np.pi * share))
    state.optimizer.step()
    state.step += 1
    return float(loss.detach())


class _State:
    """How far a search is; goes to and from a file of plain arrays."""

    def __init__(self, table: SearchedTable, config: SearchConfig) -> None:
        self.parameters = TableParameters(table)
        self.optimizer = torch.optim.Adam(
            [self.parameters.logits, self.parameters.coefficients], lr=config.lr, betas=(0.9, 0.95)
        )
        self.step = 0
        self.best, self.best_error = table, float("inf")
        self.history: list[tuple[int, float, float | None]] = []

    def write(self, path: Path, named: str) -> None:
        """Keeps everything that the next step depends on."""
        arrays: dict[str, Any] = {
            "config": np.asarray(named),
            "step": np.asarray(self.step),
            "best_error": np.asarray(self.best_error),
            "history": np.asarray([(s, loss, np.nan if c is None else c) for s, loss, c in self.history]),
        }
        flat = [c for row in self.best.rows for c in row]
        arrays |= {"best/steps": np.asarray(self.best.steps), "best/coefficients": np.asarray(flat, np.float64)}
        for name, tensor in self._tensors().items():
            arrays[name] = tensor.detach().numpy()
            for key, value in self.optimizer.state[tensor].items():
                arrays[f"{name}/{key}"] = value.numpy()
        write_kept(path, arrays)

    @classmethod
    def read(cls, path: Path, table: SearchedTable, config: SearchConfig, named: str) -> _State | None:
        """What a stopped search of the same model and settings left; None where there is nothing that fits."""
        arrays = read_kept(path)
        if arrays is None or not arrays.keys() >= _KEPT or str(arrays["config"]) != named:
            return None
        state = cls(table, config)
        state.step = int(arrays["step"])
        state.history = [(int(s), float(loss), None if np.isnan(c) else float(c)) for s, loss, c in arrays["history"]]
        flat = iter(arrays["best/coefficients"].tolist())
        rows = tuple(tuple(next(flat) for _ in range(i)) for i in range(len(table.steps)))
        state.best = SearchedTable(tuple(arrays["best/steps"].tolist()), rows, table.refiner)
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


_KEPT = {"config", "step", "best_error", "history", "best/steps", "best/coefficients"} | {
    f"{name}{part}" for name in ("logits", "coefficients") for part in ("", "/step", "/exp_avg", "/exp_avg_sq")
}


def _named(config: SearchConfig) -> str:
    """Everything that a search depends on beside its networks, as text."""
    return repr(sorted(asdict(config).items()))
