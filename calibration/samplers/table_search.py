"""Search a multistep table for a model by gradient: its step lengths and coefficients, against fine trajectories.

The family is that of arXiv 2505.21114 (`tableaus.MultistepTable`): step i goes along a combination of all slopes so
far. Here the last evaluations may be those of the velocity refiner. Everything is measured on guided trajectories of
the model itself. Seeds that the search never saw decide whether its table is better than the initial one.

Letters: B images, N branches, C latent channels, H = W latent side, E evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.model import NetworkSet
from calibration.samplers.probe import FIT_SEED, HELD_OUT_SEED
from flowturbo.torch_sampler import GuidedNetworks, make_conditions, sample
from runtime.sampling.blocks import MAX_REFINER_STEP
from runtime.sampling.calibrated import MAX_TABLE_STEPS
from runtime.sampling.grids import build_grid_from_steps
from runtime.sampling.guidance import GuidanceInterval
from runtime.sampling.noise import sample_noise
from runtime.sampling.solvers import plan_heun
from runtime.sampling.tableaus import SEARCHED_TABLES, MultistepTable
from runtime.system.array_store import Arrays, KeyedStore, hash_json
from runtime.system.errors import RequestError
from runtime.system.progress import SILENT, Progress

SELECT_SEED = FIT_SEED + 500_000
"""First seed of the images that choose among the tables of the search."""


@dataclass(frozen=True)
class SearchConfig:
    """What is searched and how.

    Attributes:
        nfe: predictor evaluations.
        refiner_nfe: refiner evaluations after them.
        guidance, channels, interval: how the trajectories are guided.
        images: the search looks at so many; half as many choose among its tables, as many again decide at the end.
        batch: images of one step of the search.
        steps: of the search.
        lr: peak learning rate of Adam.
        fine_steps: Heun steps of the trajectories that are the target.
        seed: of the order of the images.
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
class TrajectorySet:
    """Starts and ends of some trajectories: noise and fine latents [B, C, H, W], labels."""

    noise: Tensor
    fine: Tensor
    labels: tuple[int, ...]

    def select(self, positions: NDArray[np.int64]) -> TrajectorySet:
        """Return those at some positions."""
        index = torch.from_numpy(positions)
        return TrajectorySet(self.noise[index], self.fine[index], tuple(self.labels[i] for i in positions))


@dataclass(frozen=True)
class TableSearchResult:
    """What a search gives.

    Attributes:
        table: the searched one.
        initial: the one that the search began with.
        before, after: errors of the initial and of the searched table, on seeds that the search never saw.
        history: (step, loss on the batch, error on the choosing images or None).
    """

    table: MultistepTable
    initial: MultistepTable
    before: float
    after: float
    history: tuple[tuple[int, float, float | None], ...]

    @property
    def better_table(self) -> MultistepTable:
        """The one with the smaller error."""
        return self.table if self.after < self.before else self.initial


def make_initial_table(nfe: int, refiner_nfe: int = 0) -> MultistepTable:
    """Return where a search begins: the published table of so many evaluations, else Adams–Bashforth 2 in equal steps.

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
        """Return the coefficients of step i over earlier slopes, [i]."""
        start = i * (i - 1) // 2
        return self.coefficients[start : start + i]

    def to_table(self) -> MultistepTable:
        """Return the table as plain numbers."""
        steps = tuple(float(h) for h in self.steps.detach())
        coefficients = tuple(tuple(float(c) for c in self.slice_coefficients(i).detach()) for i in range(len(steps)))
        return MultistepTable(steps, coefficients, self.refiner)


def guide_networks(networks: NetworkSet, labels: Sequence[int], config: SearchConfig) -> GuidedNetworks:
    """Return the networks under the guidance of a search, for images of these classes."""
    conditions = make_conditions(
        labels, [config.guidance] * len(labels), networks.predictor.config.find_null_label(config.guidance)
    )
    return GuidedNetworks(networks.by_role, conditions, networks.shape[0], config.channels)


def sample_with_table(
    parameters: TableParameters, networks: GuidedNetworks, interval: GuidanceInterval, noise: Tensor
) -> Tensor:
    """Return the latents [B, C, H, W] of a table, differentiable in its parameters: `solvers.plan_multistep`."""
    steps, x, images = parameters.steps, noise, len(noise)
    num_predictor = len(steps) - parameters.refiner
    # As it will be deployed: guidance depends on the grid in float64.
    guided = [interval.is_active(t) for t in build_grid_from_steps([float(h) for h in steps.detach()])]
    outputs: list[Tensor] = []  # [N, C, H, W] each
    t = torch.zeros((), dtype=torch.float64)
    for i, h in enumerate(steps):
        if i >= num_predictor and guided[i - 1] == guided[i]:
            outputs.append(networks.evaluate("refiner", x, t, outputs[-1], guided=guided[i]) + outputs[-1])
        else:
            outputs.append(networks.evaluate("predictor", x, t, guided=guided[i]))
        coefficients = parameters.slice_coefficients(i)
        slope = (1 - coefficients.sum()) * outputs[i][:images]
        for j in range(i):
            slope = slope + coefficients[j] * outputs[j][:images]
        x = (x + h * slope).float()
        t = t + h
    return x


def measure_distance(latents: Tensor, fine: Tensor) -> Tensor:
    """Return the root mean square difference per image, [B]."""
    return (latents - fine).double().square().flatten(1).mean(dim=1).sqrt()


def search_table(
    networks: NetworkSet,
    config: SearchConfig,
    partial: Path,
    progress: Progress = SILENT,
    *,
    model: str = "",
    resume: bool = True,
) -> TableSearchResult:
    """Search a table.

    Args:
        partial: file of the state of the search; a search that was stopped goes on there.
        model: names the networks; the search of another model does not go on.
        resume: False begins anew.
    """
    seeds = {
        "fit": (FIT_SEED, config.images),
        "select": (SELECT_SEED, max(1, config.images // 2)),
        "held out": (HELD_OUT_SEED, config.images),
    }
    trajectories: dict[str, TrajectorySet] = {}
    for name, (first_seed, count) in seeds.items():
        progress.stage(f"fine trajectories of {count} images, {name}")
        trajectories[name] = sample_fine_trajectories(networks, config, first_seed, count)
    initial = make_initial_table(config.nfe, config.refiner_nfe)
    store, state = KeyedStore(partial, hash_json([model, asdict(config)])), _SearchState(initial, config)
    if resume and (arrays := store.load(*_STATE_ARRAYS, progress=progress)) is not None:
        state.restore(arrays)
        progress.write(f"going on at step {state.step} of {config.steps} ({partial})")
    if not state.history:
        state.best_error = _measure_error(networks, config, initial, trajectories["select"])
        progress.write(f"began with {state.best_error:.4f} on the choosing images")
    while state.step < config.steps:
        loss = state.take_step(networks, trajectories["fit"])
        progress.update("steps of the search", state.step, config.steps)
        if state.step % 10 and state.step != config.steps:
            state.history.append((state.step, loss, None))
            continue
        table = state.parameters.to_table()
        selection_error = _measure_error(networks, config, table, trajectories["select"])
        if selection_error < state.best_error:
            state.best, state.best_error = table, selection_error
        progress.write(f"step {state.step}/{config.steps}  loss {loss:.4f}  choosing images {selection_error:.4f}")
        state.history.append((state.step, loss, selection_error))
        store.save(state.to_arrays())
    before, after = (
        _measure_error(networks, config, table, trajectories["held out"]) for table in (initial, state.best)
    )
    progress.write(f"held-out seeds: {before:.4f} before, {after:.4f} after")
    return TableSearchResult(state.best, initial, before, after, tuple(state.history))


def sample_fine_trajectories(networks: NetworkSet, config: SearchConfig, first_seed: int, count: int) -> TrajectorySet:
    """Return where a fine Heun run takes the noise of `count` seeds, classes taking turns."""
    labels = tuple(networks.classes[i % len(networks.classes)] for i in range(count))
    noise = torch.from_numpy(sample_noise(range(first_seed, first_seed + count), networks.shape))
    interval = GuidanceInterval(*config.interval)
    grid = tuple(i / config.fine_steps for i in range(config.fine_steps + 1))
    plan = [replace(evaluation, guided=interval.is_active(evaluation.t)) for evaluation in plan_heun(grid)]
    conditions = make_conditions(
        labels, [config.guidance] * count, networks.predictor.config.find_null_label(config.guidance)
    )
    batches = [slice(start, start + config.batch) for start in range(0, count, config.batch)]
    fine = [
        sample(networks.by_role, plan, conditions[batch], noise[batch], guided_channels=config.channels)
        for batch in batches
    ]
    return TrajectorySet(noise, torch.cat(fine), labels)


def _measure_error(
    networks: NetworkSet, config: SearchConfig, table: MultistepTable, trajectories: TrajectorySet
) -> float:
    """Mean distance over images."""
    parameters, interval, distances = TableParameters(table), GuidanceInterval(*config.interval), []
    with torch.no_grad():
        for start in range(0, len(trajectories.labels), config.batch):
            batch = trajectories.select(np.arange(start, min(start + config.batch, len(trajectories.labels))))
            guided_networks = guide_networks(networks, batch.labels, config)
            latents = sample_with_table(parameters, guided_networks, interval, batch.noise)
            distances.append(measure_distance(latents, batch.fine))
    return float(torch.cat(distances).mean())


class _SearchState:
    """Everything that the next step of a search depends on."""

    def __init__(self, table: MultistepTable, config: SearchConfig) -> None:
        self.config, self.parameters = config, TableParameters(table)
        self.tensors = {"logits": self.parameters.logits, "coefficients": self.parameters.coefficients}
        self.optimizer = torch.optim.Adam(list(self.tensors.values()), lr=config.lr, betas=(0.9, 0.95))
        self.step = 0
        self.best, self.best_error = table, float("inf")
        self.history: list[tuple[int, float, float | None]] = []

    def take_step(self, networks: NetworkSet, trajectories: TrajectorySet) -> float:
        """Change the parameters by one step of Adam, and return the loss of its batch before."""
        config = self.config
        random = np.random.Generator(np.random.Philox(key=[config.seed, self.step]))
        batch = trajectories.select(random.permutation(len(trajectories.labels))[: config.batch])
        guided_networks = guide_networks(networks, batch.labels, config)
        latents = sample_with_table(self.parameters, guided_networks, GuidanceInterval(*config.interval), batch.noise)
        loss = measure_distance(latents, batch.fine).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(self.tensors.values()), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + np.cos(np.pi * (self.step / config.steps)))
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def to_arrays(self) -> Arrays:
        arrays: Arrays = {
            "step": np.asarray(self.step),
            "best_error": np.asarray(self.best_error),
            "history": np.asarray([(s, loss, np.nan if c is None else c) for s, loss, c in self.history]),
            "best/steps": np.asarray(self.best.step_sizes),
            "best/coefficients": np.asarray([c for row in self.best.coefficients for c in row], np.float64),
        }
        for name, tensor in self.tensors.items():
            arrays[name] = tensor.detach().numpy()
            arrays |= {f"{name}/{key}": value.numpy() for key, value in self.optimizer.state[tensor].items()}
        return arrays

    def restore(self, arrays: Arrays) -> None:
        self.step, self.best_error = int(arrays["step"]), float(arrays["best_error"])
        self.history = [(int(s), float(loss), None if np.isnan(c) else float(c)) for s, loss, c in arrays["history"]]
        steps, coefficients = tuple(arrays["best/steps"].tolist()), iter(arrays["best/coefficients"].tolist())
        rows = tuple(tuple(next(coefficients) for _ in range(i)) for i in range(len(steps)))
        self.best = MultistepTable(steps, rows, self.parameters.refiner)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(torch.from_numpy(arrays[name]))
                self.optimizer.state[tensor] = {
                    key: torch.from_numpy(arrays[f"{name}/{key}"]) for key in ("step", "exp_avg", "exp_avg_sq")
                }


_STATE_ARRAYS = (
    *("step", "best_error", "history", "best/steps", "best/coefficients"),
    *("logits", "logits/step", "logits/exp_avg", "logits/exp_avg_sq"),
    *("coefficients", "coefficients/step", "coefficients/exp_avg", "coefficients/exp_avg_sq"),
)
