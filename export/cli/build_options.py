"""The options of `build-engines`, by subject."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from export.build_request import DEFAULT_MAX_BATCH, MAX_BATCH, BuildRequest, resolve_request
from export.proof.gate import MIN_IMAGES, GateLimits
from export.targets import PRECISIONS
from runtime.directory.records import TARGETS
from runtime.system.option_fields import option

TimeDirection = Literal["noise-to-data", "data-to-noise"]
WeightSet = Literal["ema", "model"]


@dataclass(frozen=True)
class TargetOptions:
    """What the engines are built for."""

    targets: tuple[str, ...] = option(
        ("auto",), "--target", help="What will run the engines; may be repeated.", choices=(*TARGETS, "auto")
    )
    precision: str = option(
        "auto",
        help="auto: cpu fp32, openvino bf16 with AMX, GPUs fp16. int8 needs --calibration; int8-weights and "
        "int4-weights save memory.",
        choices=PRECISIONS,
    )


@dataclass(frozen=True)
class CheckpointOptions:
    """Which checkpoints are exported, and how."""

    predictor: Path | None = option(None, help="SiT checkpoint (.pt or .safetensors).", default_text="the demo model")
    refiner: str | None = option(None, help="FlowTurbo refiner checkpoint, or none.")
    vaes: tuple[str, ...] = option((), "--vae", help="ema, mse, taesd, a folder, a hub id, or none; may be repeated.")
    resolutions: tuple[int, ...] = option(
        (), "--resolution", help="Pixels a side; may be repeated.", default_text="as trained"
    )
    heads: int | None = option(None, help="Attention heads, where the width does not tell.", advanced=True)
    time_direction: TimeDirection | None = option(None, help="data-to-noise for REPA checkpoints.", advanced=True)
    weights: WeightSet | None = option(
        None, help="Which weights of a training checkpoint.", default_text="ema if it has some", advanced=True
    )
    num_classes: int | None = option(
        None, help="Classes, where the label table may lack the null label.", minimum=1, advanced=True
    )
    calibration: Path | None = option(None, help="Ranges of flowturbo-calibrate int8; --precision int8 needs them.")
    choice: Path | None = option(None, help="What stays wide, from flowturbo-calibrate sensitivity.", advanced=True)
    max_batch: int | None = option(
        None,
        help="Largest batch of one engine call.",
        minimum=1,
        maximum=MAX_BATCH,
        default_text=str(DEFAULT_MAX_BATCH),
    )
    static_batch: bool = option(False, help="Engines for exactly max-batch images.", advanced=True)
    encoder: bool = option(False, "--encoder/--no-encoder", help="Build the VAE's encoder too.", advanced=True)
    tile: int | None = option(
        None, help="Also decoders for tiles of so many pixels, for large pictures in little memory.", advanced=True
    )

    def resolve(self, target: TargetOptions) -> BuildRequest:
        """Check the options and hash the files; see `resolve_request`."""
        return resolve_request(
            predictor=self.predictor,
            refiner=self.refiner,
            vaes=self.vaes,
            resolutions=self.resolutions,
            heads=self.heads,
            time_direction=self.time_direction,
            weights=self.weights,
            num_classes=self.num_classes,
            targets=target.targets,
            precision=target.precision,
            max_batch=DEFAULT_MAX_BATCH if self.max_batch is None else self.max_batch,
            static_batch=self.static_batch,
            encoder=self.encoder,
            tile=self.tile,
            calibration=self.calibration,
            choice=self.choice,
        )


@dataclass(frozen=True)
class GateOptions:
    """What quantised engines have to reach; the limits of `GateLimits` where None."""

    gate_images: int | None = option(
        None,
        help="Pictures that a quantised build is compared by.",
        minimum=MIN_IMAGES,
        default_text=str(GateLimits().images),
        advanced=True,
    )
    gate_psnr: float | None = option(
        None,
        help="dB that their median must have against the wider build's.",
        minimum=0,
        default_text=f"{GateLimits().psnr_db:g}",
        advanced=True,
    )

    def make_limits(self) -> GateLimits:
        """Return the limits of the gate."""
        limits = GateLimits()
        return replace(
            limits,
            images=limits.images if self.gate_images is None else self.gate_images,
            psnr_db=limits.psnr_db if self.gate_psnr is None else self.gate_psnr,
        )


@dataclass(frozen=True)
class BuildOptions:
    """Where a build comes from and goes to, and what it may do."""

    out: Path | None = option(None, help="Engine directory to make.", default_text="engines, or --from")
    source: Path | None = option(None, "--from", help="Take ONNX files and proof from this directory: needs no torch.")
    samplers: tuple[Path, ...] = option(
        (),
        "--sampler",
        help="Keep this sampler of flowturbo-calibrate in the directory; may be repeated.",
        advanced=True,
    )
    default_schedule: str | None = option(
        None, help="What flowturbo-run uses: blocks, or the name of a saved sampler.", advanced=True
    )
    against: Path | None = option(
        None,
        help="With --from: compare quantised engines with the wider ones in this directory, on this device.",
        advanced=True,
    )
    low_memory: bool = option(False, help="Small builder workspace, for boards of 8 GB and less.", advanced=True)
    rebuild: bool = option(False, help="Build even if nothing changed.")
    force: bool = option(
        False, help="Keep engines that miss their tolerance; go on without those that fail.", advanced=True
    )
    allow_foreign: bool = option(False, help="Accept engines of another device from --from.", advanced=True)
    as_json: bool = option(False, "--json", help="Print the manifest and nothing else on stdout.")
