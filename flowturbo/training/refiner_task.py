"""Training FlowTurbo's velocity refiner: distils one Euler step of its predictor (arXiv 2409.18128, algorithm 1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowturbo.checkpoints import save_network
from flowturbo.data.latents import LatentSource
from flowturbo.data.photographs import Pixels
from flowturbo.flow import RefinerLossOptions, refiner_loss
from flowturbo.models.sit import SiT
from flowturbo.models.vae import Vae
from flowturbo.training.config import FlowConfig, RefinerConfig
from flowturbo.training.loop import Losses
from flowturbo.training.preview import decode_latents, sample_flowturbo
from flowturbo.training.random_draws import Microbatch, make_generator
from flowturbo.training.sit_task import (
    PREVIEW_GUIDANCE,
    LatentBatch,
    LatentTask,
    build_preview_grid,
    load_latent_batch,
)
from runtime.sampling.blocks import parse_schedule
from runtime.sampling.grids import build_explicit_grid
from runtime.system.errors import DataError, TrainingError

StepArray = NDArray[np.float64]
"""[number of steps, 2]: t and Δt of each."""

_ALLOWED_FILES = (
    'a saved sampler with "grid" (times from 0 to 1), or a run.json of flowturbo-run whose images have a "path"'
)
_STEP_STREAM = 1 << 61  # keys of step draws, above all positions
PREVIEW_SCHEDULE = "H1P5R3"


def read_steps(path: Path) -> StepArray:
    """Read the steps of a saved sampler's grid, or the accepted ones of every image in flowturbo-run's run.json.

    A step that many images took is there as many times, so that drawing rows draws from what was taken.

    Raises:
        DataError: unreadable, of neither form, or with a step outside of 0 … 1.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--steps-from {path} cannot be read: {error}", allowed=_ALLOWED_FILES) from error
    if not isinstance(content, dict):
        raise DataError(f"--steps-from {path} holds no JSON object", allowed=_ALLOWED_FILES)
    try:
        if content.get("grid") is not None:  # null in a saved sampler that chooses its steps
            steps = [(a, b - a) for a, b in pairwise(build_explicit_grid(content["grid"]))]
        else:
            path_steps = (step for image in content.get("images", []) for step in image.get("path") or ())
            steps = [(float(step["t"]), float(step["dt"])) for step in path_steps if step["accepted"]]
        step_array = np.asarray(steps, dtype=np.float64).reshape(-1, 2)
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"--steps-from {path} is damaged: {str(error).splitlines()[0]}", allowed=_ALLOWED_FILES
        ) from error
    t, dt = step_array.T
    if len(step_array) == 0 or not bool(np.all((t >= 0) & (t < 1) & (dt > 0))):
        raise DataError(
            f"--steps-from {path} holds {'no accepted step' if len(step_array) == 0 else 'a step outside of 0 … 1'}",
            allowed=_ALLOWED_FILES,
            remedy="write one: flowturbo-run --engine DIR with an adaptive sampler leaves OUT/run.json",
        )
    step_array[:, 1] = np.minimum(dt, 1 - t)  # dopri5's reference mode steps beyond the end
    return step_array


class RefinerBatch(NamedTuple):
    """Samples, and the step [B] that each is trained for."""

    samples: LatentBatch
    t: Tensor
    dt: Tensor


class RefinerTask(LatentTask):
    """Distillation of a predictor's slope one step ahead into a one-block network."""

    kind = "refiner"

    def __init__(
        self,
        refiner: SiT,
        teacher: SiT,
        source: LatentSource,
        config: RefinerConfig,
        seed: int,
        *,
        steps: StepArray | None = None,
        vae: Vae | None = None,
        compile: bool = False,
        files: Mapping[str, Path] | None = None,
        is_null_trained: bool = True,
    ) -> None:
        """Take a refiner and the predictor that teaches it.

        Args:
            refiner: what is trained.
            teacher: its predictor.
            source: of the latents.
            config: which steps it learns.
            seed: of everything that is drawn.
            steps: [number of steps, 2] steps of a sampler, in place of uniform ones.
            vae: for sample grids.
            compile: compile the predictor.
            files: what the networks were read from, for the run's record.
            is_null_trained: the predictor has learned its null label; without it previews are not guided.

        Raises:
            TrainingError: refiner, predictor and latents do not fit together.
        """
        super().__init__(refiner, source, seed, vae, files or {})
        if refiner.config.classes != teacher.config.classes:
            raise TrainingError(
                f"the refiner has {refiner.config.classes} classes, its predictor {teacher.config.classes}",
                allowed="the same classes: the last row of their tables is the null label",
                remedy="name a refiner of this predictor with --init, or leave --init out",
            )
        self.config, self.steps, self.is_null_trained = config, steps, is_null_trained
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_velocity = torch.compile(self.teacher) if compile else self.teacher
        self._flow_config = FlowConfig(config.label_dropout)

    def to(self, device: torch.device) -> None:
        """Move the networks and all that the losses need."""
        super().to(device)
        self.teacher.to(device)

    def describe(self) -> dict[str, object]:
        """Return everything beside the loop's options that is needed to repeat the run."""
        return self.describe_with(
            teacher=self.teacher.config.to_json(),
            refiner=asdict(self.config),
            steps=None if self.steps is None else {"count": len(self.steps), "mean_dt": self.steps[:, 1].mean()},
        )

    def load_batch(self, microbatch: Microbatch) -> RefinerBatch:
        """Return the samples of a share, and their steps.

        A sampler's steps are drawn per sample: their t and Δt belong together, and one pair for a whole batch would
        show it a single time. Uniform Δt is one draw for all samples of a step, as released.
        """
        positions, classes = microbatch.positions, self.model.config.classes
        samples = load_latent_batch(self.source, FlowConfig(self.config.label_dropout), classes, self.seed, positions)
        if self.steps is not None:
            indices = [make_generator(self.seed, _STEP_STREAM + p).integers(len(self.steps)) for p in positions]
            steps = torch.from_numpy(self.steps[np.asarray(indices)].astype(np.float32))
            return RefinerBatch(samples, steps[:, 0], steps[:, 1])
        low, high = self.config.min_dt, self.config.max_dt
        dt = low + float(make_generator(self.seed, _STEP_STREAM + microbatch.step_start).random()) * (high - low)
        t = samples.t if self.config.reference_behaviour else samples.t.clamp(max=1 - dt)
        return RefinerBatch(samples, t, torch.full_like(t, dt))

    def compute_losses(self, batch: RefinerBatch) -> Losses:
        """Return the mean squared error of the refined velocity."""
        samples, classes = batch.samples, self.model.config.classes
        data = self.source.sample(samples.raw, samples.posterior_noise)
        guidance, student_labels = None, samples.labels_with_dropout
        if self.config.teacher_guidance != 1:
            # Guidance trains the null row on every sample. What label dropout leaves unguided keeps the refiner fit
            # for the times at which a guidance interval leaves the velocity alone.
            is_unguided = samples.labels_with_dropout == classes
            guidance = torch.where(is_unguided, 1.0, self.config.teacher_guidance).to(data)
            student_labels = samples.labels
        options = RefinerLossOptions(
            guidance, classes, self.config.second_call == "consistent", self.config.reference_behaviour
        )
        loss = refiner_loss(
            self.model,
            self.teacher_velocity,
            data,
            samples.noise,
            batch.t,
            batch.dt,
            samples.labels,
            student_labels,
            options,
        )
        return {"loss": loss.mean()}

    @torch.no_grad()
    def render_preview(self, ema: nn.Module) -> tuple[Pixels, int] | None:
        """Draw by H1P5R3 with this refiner: one column per class (the first ten), seeds 0, 1, … downwards."""
        assert isinstance(ema, SiT)
        if self.vae is None:
            return None
        noise, labels, columns = build_preview_grid(self.source, self.vae.device)
        schedule = parse_schedule(PREVIEW_SCHEDULE, consistent=self.config.second_call == "consistent")
        guidance = self.config.teacher_guidance
        if guidance == 1 and self.is_null_trained:
            guidance = PREVIEW_GUIDANCE
        return decode_latents(self.vae, sample_flowturbo(self.teacher, ema, noise, labels, schedule, guidance)), columns

    def save_result(self, ema: nn.Module, out: Path) -> Path:
        """Save the averaged weights as `out/final.safetensors`."""
        assert isinstance(ema, SiT)
        extra = {**self.describe_provenance(), "refiner": asdict(self.config)}
        save_network(out / "final.safetensors", ema, role="refiner", extra=extra)
        return out / "final.safetensors"
