"""What is trained and how, as saved in a run's config.json. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from runtime.request import MAX_SEED
from runtime.sampling.guidance import MAX_SCALE
from runtime.system.errors import RequestError, TrainingError
from runtime.system.option_fields import REQUIRED, option, split_words

MIN_LPIPS_SIDE = 16
"""Pixels a side: VGG halves four times."""


@dataclass(frozen=True)
class LoopConfig:
    """How long and how to train; what is trained is a task's business.

    Attributes:
        max_steps: optimiser steps in all, counted from the first start, not from a resume.
        batch_size: samples of one forward pass in one process.
        accumulate: forward passes of a process in one step, their gradients averaged. A step has
            batch_size · accumulate · processes samples, and how they are divided does not change what is computed.
        lr: peak learning rate, reached after `warmup` steps.
        schedule: of the learning rate after warm-up: it stays, or falls to 0 at the end like a cosine or a line.
        decay: under a constant schedule, the last steps over which it falls to 0 in a line. The length of such a run
            can be chosen late: resume with another `max_steps`.
        optimizer: "muon" gives the hidden matrices to Muon (orthogonalised momentum) and the rest to AdamW.
        beta2: AdamW's decay of squared gradients (the released code has 0.999; short runs want less).
        muon_lr: learning rate of Muon's matrices, before its own scaling to AdamW's update size.
        clip: largest norm of the gradient; 0 for any.
        explode: a loss above this many times the running median stops the run; 0 for never (`watch.py`).
        ema: decay of the averaged weights.
        precision: "bf16" runs the networks under autocast; weights, optimiser and losses stay float32.
        device: "auto" is the GPU where there is one.
        checkpoint_every, keep: steps between checkpoints, and how many of the last are kept.
        sample_every: steps between sample grids; 0 for none.
    """

    max_steps: int = option(REQUIRED, help="Steps in all, resumed ones included.")
    batch_size: int = option(REQUIRED, help="Samples of one forward pass in one process.")
    accumulate: int = option(1, help="Forward passes of a process in one step.", advanced=True)
    lr: float = option(1e-4, help="Peak learning rate.")
    schedule: Literal["constant", "cosine", "linear"] = option(
        "constant", "--lr-schedule", help="After the warm-up.", advanced=True
    )
    warmup: int = option(0, help="Steps over which the learning rate rises.", advanced=True)
    decay: int = option(0, help="Last steps over which a constant learning rate falls to 0.", advanced=True)
    optimizer: Literal["adamw", "muon"] = option("adamw", help="Of the hidden matrices.", advanced=True)
    beta2: float = option(0.99, help="Of AdamW; 0.999 in the released code.", advanced=True)
    muon_lr: float = option(1e-3, help="Peak learning rate of the matrices under --optimizer muon.", advanced=True)
    weight_decay: float = option(0.0, help="Decoupled weight decay.", advanced=True)
    clip: float = option(1.0, help="Largest norm of the gradient; 0 for any.", advanced=True)
    explode: float = option(
        10.0, help="A loss this many times the running median stops the run; 0: never.", advanced=True
    )
    ema: float = option(0.9999, help="Decay of the averaged weights.", advanced=True)
    precision: Literal["fp32", "bf16"] = option("fp32", help="bf16: autocast.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="auto: the GPU, if any.", advanced=True)
    compile: bool = option(False, "--compile/--no-compile", help="torch.compile the networks.", advanced=True)
    seed: int = option(0, help="Of the weights and of everything drawn.", advanced=True)
    checkpoint_every: int = option(1000, help="Steps between checkpoints.", advanced=True)
    keep: int = option(3, help="Checkpoints kept.", advanced=True)
    sample_every: int = option(0, help="Steps between sample grids; 0 for none.")

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulate", "checkpoint_every", "keep"):
            self._check(name, getattr(self, name) >= 1, "1 or more", "100")
        for name in ("warmup", "decay", "sample_every"):
            self._check(name, getattr(self, name) >= 0, "0 or more", "0")
        self._check("seed", 0 <= self.seed < MAX_SEED, "0 to 2^63 − 1", "0")
        for name in ("lr", "muon_lr"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a number above 0", "1e-4")
        for name in ("weight_decay", "clip", "explode"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0, or a number above it", "1")
        self._check("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1", "0.999")
        self._check("ema", 0 <= self.ema < 1, "at least 0 and below 1", "0.9999")

    def _check(self, name: str, is_valid: bool, allowed: str, example: str) -> None:
        if not is_valid:
            flag = "--" + name.replace("_", "-")
            raise TrainingError(f"{flag} is {getattr(self, name)}", allowed=allowed, remedy=f"e.g. {flag} {example}")

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def compute_lr_scale(self, step: int) -> float:
        """Share of the peak learning rate at `step`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return min(1.0, (self.max_steps - step) / self.decay) if self.decay else 1.0
        progress = (step - self.warmup) / max(1, self.max_steps - self.warmup)
        return 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def parse_widths(name: str, text: str) -> tuple[int, ...]:
    """Return the widths of "32,64,96"."""
    try:
        return tuple(map(int, split_words(name, text)))
    except ValueError as error:
        raise RequestError(
            f"{name} {text!r}", allowed="whole numbers separated by commas", remedy=f"e.g. {name} 32,64,96"
        ) from error


@dataclass(frozen=True)
class VaeConfig:
    """What the autoencoder is and what it minimises.

    Attributes:
        channels: widths from full resolution down; each further one halves the side.
        layers: residual blocks per level.
        crop: side of the random squares it trains on (it is fully convolutional); 0 for whole photographs.
        loss: "l1", or "mse" for mostly squared error, which gives smoother pictures.
        lpips: weight of the perceptual distance beside it; 0 without its weights.
        kl: weight of the KL divergence, averaged over latent elements, beside a loss averaged over pixels.
        equivariance: share of every batch whose latents are halved in size and must decode to the halved image.
            Latents then vary with scale as images do, and a diffusion model learns them faster (Kouzelis et al.
            2025, arXiv 2502.09509; Skorokhodov et al. 2025, arXiv 2502.14831).
        freeze_encoder: trains the decoder only.
    """

    channels: tuple[int, ...] = option(
        (32, 64, 96), help="Widths from full resolution down.", default_text="32,64,96", parse=parse_widths
    )
    layers: int = option(1, help="Residual blocks per level.", minimum=1, advanced=True)
    latent_channels: int = option(4, help="Channels of the latents.", minimum=1, advanced=True)
    groups: int = 16
    crop: int = option(32, help="Side of random training crops; 0: whole.", minimum=0)
    loss: Literal["l1", "mse"] = option("l1", help="Distance of the pixels.", advanced=True)
    lpips: float = 0.0
    kl: float = option(1e-3, help="Weight of the KL divergence per latent element.", advanced=True)
    equivariance: float = option(0.25, help="Share and weight of half-scale latents.", advanced=True)
    freeze_encoder: bool = option(
        False, help="Train the decoder only: a second decoder for the same latents.", advanced=True
    )

    def __post_init__(self) -> None:
        if not 0 <= self.equivariance <= 1:
            raise TrainingError(
                f"--equivariance is {self.equivariance}", allowed="0 to 1", remedy="e.g. --equivariance 0.25"
            )
        for flag, weight in (("--kl", self.kl), ("--lpips-weight", self.lpips)):
            if not 0 <= weight < math.inf:
                raise TrainingError(f"{flag} is {weight}", allowed="0, or a number above it", remedy=f"e.g. {flag} 1")
        if self.lpips and 0 < self.crop < MIN_LPIPS_SIDE:
            raise TrainingError(
                f"--lpips on crops of {self.crop} pixels", allowed=f"{MIN_LPIPS_SIDE} or more", remedy="a larger --crop"
            )


@dataclass(frozen=True)
class FlowConfig:
    """Which times and labels a SiT is trained on.

    Attributes:
        label_dropout: share of samples trained with the null label, for guidance.
        times: distribution of t: uniform (SiT), or the sigmoid of a normal number (Esser et al. 2024), which
            spends more samples on the middle of the path.
        times_mean: mean of that normal number.
    """

    label_dropout: float = option(0.1, help="Share without a label.", minimum=0, maximum=1, advanced=True)
    times: Literal["uniform", "logit-normal"] = option("uniform", help="Distribution of the flow times.", advanced=True)
    times_mean: float = option(0.0, help="Of the normal number under --times logit-normal.", advanced=True)

    def __post_init__(self) -> None:
        if not math.isfinite(self.times_mean):
            raise TrainingError(
                f"--times-mean is {self.times_mean}", allowed="a finite number", remedy="e.g. --times-mean 0"
            )


@dataclass(frozen=True)
class RefinerConfig:
    """Which refiner is trained.

    Attributes:
        min_dt, max_dt: step sizes are uniform between these, one draw per step of the optimiser, as released.
        label_dropout: share of samples whose label is dropped; under guidance, the share that is not guided.
        reference_behaviour: lets t + Δt reach 1 + max_dt as the released code does, instead of t ≤ 1 − Δt.
        teacher_guidance: scale of the velocities it learns to refine; 1 for unguided ones, as released.
        second_call: "consistent" also trains the second call of the consistent block.
        steps_from: the file that (t, Δt) are drawn from, in place of uniform ones.
    """

    min_dt: float = option(0.0, help="Step sizes are uniform from this …", advanced=True)
    max_dt: float = option(0.12, help="… to this.", advanced=True)
    label_dropout: float = option(0.1, help="Share without a label.", minimum=0, maximum=1, advanced=True)
    reference_behaviour: bool = option(False, help="Let t + dt pass 1, as the released code does.", advanced=True)
    teacher_guidance: float = option(1.0, help="Learn to refine velocities guided at this scale.")
    second_call: Literal["single", "consistent"] = option(
        "single", help="consistent: also train the second call of the consistent block.", advanced=True
    )
    steps_from: str | None = option(
        None,
        help='Draw (t, Δt) from the steps of a saved sampler (JSON with "grid") or of a run.json of flowturbo-run.',
        metavar="PATH",
        advanced=True,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.min_dt <= self.max_dt <= 1 or self.max_dt == 0:
            raise TrainingError(
                f"--min-dt is {self.min_dt}, --max-dt {self.max_dt}",
                allowed="0 ≤ min-dt ≤ max-dt ≤ 1, max-dt above 0",
                remedy="e.g. --max-dt 0.12, what FlowTurbo trains for",
            )
        if not 0 < self.teacher_guidance <= MAX_SCALE:
            raise TrainingError(
                f"--teacher-guidance is {self.teacher_guidance}",
                allowed=f"above 0 and at most {MAX_SCALE:g}; 1 is none",
                remedy="name the scale that will be sampled with",
            )
        if self.steps_from and self.reference_behaviour:
            raise TrainingError(
                "--steps-from with --reference-behaviour",
                allowed="one of them: the steps of a sampler never pass 1",
                remedy="leave one out",
            )
