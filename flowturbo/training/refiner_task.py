"""Training FlowTurbo's velocity refiner: distils one Euler step of its predictor (arXiv 2409.18128, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
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
from flowturbo.training.run_log import describe_file
from flowturbo.training.sit_task import (
    PREVIEW_GUIDANCE,
    LatentBatch,
    build_preview_grid,
    check_network_fits,
    describe_provenance,
    load_latent_batch,
)
from flowturbo.training.step_lengths import StepArray
from runtime.sampling.blocks import parse_schedule
from runtime.system.errors import TrainingError

_STEP_STREAM = 1 << 61  # keys of step draws, above all positions
PREVIEW_SCHEDULE = "H1P5R3"


class RefinerBatch(NamedTuple):
    """Samples, and the step [B] that each is trained for."""

    samples: LatentBatch
    t: Tensor
    dt: Tensor


class RefinerTask:
    """Distillation of a predictor's slope one step ahead into a one-block network."""

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
    ) -> None:
        """`files` are what the networks were read from, for the run's record."""
        check_network_fits(refiner, source)
        if refiner.config.classes != teacher.config.classes:
            raise TrainingError(
                f"the refiner has {refiner.config.classes} classes, its predictor {teacher.config.classes}",
                allowed="the same classes: the last row of their tables is the null label",
                remedy="name a refiner of this predictor with --init, or leave --init out",
            )
        self.files = dict(files or {})
        self.refiner, self.source, self.config, self.seed = refiner, source, config, seed
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_velocity = torch.compile(self.teacher) if compile else self.teacher
        self.steps, self.vae = steps, vae
        self._flow_config = FlowConfig(config.label_dropout)

    @property
    def network(self) -> nn.Module:
        return self.refiner

    def to(self, device: torch.device) -> None:
        for part in (self.refiner, self.teacher, *((self.vae.module,) if self.vae else ())):
            part.to(device)
        self.source.to(device)

    def describe(self) -> dict[str, Any]:
        return {
            "task": "refiner",
            "model": self.refiner.config.to_json(),
            "teacher": self.teacher.config.to_json(),
            "refiner": asdict(self.config),
            "steps": None if self.steps is None else {"count": len(self.steps), "mean_dt": self.steps[:, 1].mean()},
            "provenance": describe_provenance(self.source),
            "data": self.source.describe(),
            "files": {name: describe_file(path) for name, path in self.files.items()},
        }

    def list_unreadable(self) -> dict[str, str]:
        return self.source.list_unreadable()

    def load_batch(self, microbatch: Microbatch) -> RefinerBatch:
        samples = load_latent_batch(
            self.source, self._flow_config, self.refiner.config.classes, self.seed, microbatch.positions
        )
        t, dt = self._draw_steps(microbatch, samples.t)
        return RefinerBatch(samples, t, dt)

    def _draw_steps(self, microbatch: Microbatch, t: Tensor) -> tuple[Tensor, Tensor]:
        """t and Δt, [B] each.

        A sampler's steps are drawn per sample: their t and Δt belong together, and one pair for a whole batch would
        show it a single time. Uniform Δt is one draw for all samples of a step, as released.
        """
        if self.steps is not None:
            indices = [
                make_generator(self.seed, _STEP_STREAM + p).integers(len(self.steps)) for p in microbatch.positions
            ]
            steps = torch.from_numpy(self.steps[np.asarray(indices)].astype(np.float32))
            return steps[:, 0], steps[:, 1]
        low, high = self.config.min_dt, self.config.max_dt
        dt = low + float(make_generator(self.seed, _STEP_STREAM + microbatch.step_start).random()) * (high - low)
        t = t if self.config.reference_behaviour else t.clamp(max=1 - dt)
        return t, torch.full_like(t, dt)

    def compute_losses(self, batch: RefinerBatch) -> Losses:
        samples, classes = batch.samples, self.refiner.config.classes
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
            self.refiner,
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
        """By H1P5R3 with this refiner: one column per class (the first ten), seeds 0, 1, … downwards."""
        assert isinstance(ema, SiT)
        if self.vae is None:
            return None
        noise, labels, columns = build_preview_grid(self.source, self.vae.device)
        schedule = parse_schedule(PREVIEW_SCHEDULE, consistent=self.config.second_call == "consistent")
        guidance = self.config.teacher_guidance if self.config.teacher_guidance != 1 else PREVIEW_GUIDANCE
        return decode_latents(self.vae, sample_flowturbo(self.teacher, ema, noise, labels, schedule, guidance)), columns

    def save_result(self, ema: nn.Module, out: Path) -> Path:
        """Saves the averaged weights as `out/final.safetensors`."""
        assert isinstance(ema, SiT)
        extra = {**describe_provenance(self.source), "refiner": asdict(self.config)}
        save_network(out / "final.safetensors", ema, role="refiner", extra=extra)
        return out / "final.safetensors"
