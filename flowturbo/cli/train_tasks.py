"""From `flowturbo-train`'s options to what the loop trains, and the start of it. Imports torch; the options do not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import click
import torch

from flowturbo.checkpoints import load_network
from flowturbo.cli import train_data
from flowturbo.cli.train_options import DataOptions, RunOptions, split_words
from flowturbo.data.latents import LatentSource
from flowturbo.models.sit import SiT, SiTConfig, build_refiner_config, build_sit_config
from flowturbo.models.vae import Vae, load_vae
from flowturbo.training.loop import TrainingRun, TrainingTask, train
from flowturbo.training.lpips import load_lpips
from flowturbo.training.processes import DeviceName
from flowturbo.training.refiner_task import RefinerConfig, RefinerTask, read_steps
from flowturbo.training.sit_task import FlowConfig, SitTask
from flowturbo.training.vae_task import VaeConfig, VaeTask, build_vae, load_trainable_vae
from runtime.system.errors import RequestError

Preset = Literal["ema", "mse"]


def run_task(run: RunOptions, make_task: Callable[[], TrainingTask]) -> None:
    """Trains what `make_task` gives, or says what would be trained; its weights come from the run's seed."""
    torch.manual_seed(run.config.seed)
    task = make_task()
    if run.dry_run:
        click.echo(json.dumps({**task.describe(), "loop": run.config.to_json()}, indent=2))
        return
    train(task, TrainingRun(run.out, run.config, run.resume))


def run_caching(
    data: DataOptions, *, out: Path, vae_name: str | None, shard: int, device: DeviceName, dry_run: bool
) -> None:
    """Encodes photographs, or says which."""
    photographs = train_data.load_photographs(data)
    train_data.say(
        f"{len(photographs)} photographs of {len(photographs.listing.names)} classes at {data.resolution} px"
    )
    if not dry_run:
        train_data.encode_photographs(photographs, out, vae_name, device, shard)


def build_vae_task(
    run: RunOptions,
    data: DataOptions,
    explicit_options: Collection[str],
    *,
    channels: str,
    preset: Preset | None,
    lpips_files: tuple[Path, ...],
    lpips_weight: float,
    init: Path | None,
    **options: Any,
) -> VaeTask:
    """An autoencoder on photographs; a preset does not overrule what was named by hand."""
    if preset:
        options |= {
            name: value for name, value in _build_preset_options(preset, init).items() if name not in explicit_options
        }
    config = VaeConfig(channels=_parse_widths(channels), lpips=lpips_weight if lpips_files else 0.0, **options)
    photographs = train_data.load_photographs(data)
    network = load_trainable_vae(init) if init else build_vae(config, data.resolution)
    perceptual = load_lpips(lpips_files) if lpips_files else None
    return VaeTask(network, photographs, config, run.config.seed, perceptual, init)


def _build_preset_options(preset: Preset, init: Path | None) -> dict[str, Any]:
    """The options of a decoder's fine-tuning."""
    if init is None:
        raise RequestError(
            f"--preset {preset} without --init",
            allowed="the VAE whose decoder is to be fine-tuned",
            remedy="--init DIR, a folder in diffusers layout",
        )
    return {"freeze_encoder": True, "kl": 0.0, "equivariance": 0.0, "loss": {"ema": "l1", "mse": "mse"}[preset]}


def _parse_widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, split_words(text)))
    except ValueError as error:
        raise RequestError(
            f"--channels {text!r}", allowed="whole numbers separated by commas", remedy="e.g. --channels 32,64,96"
        ) from error


def build_sit_task(
    run: RunOptions,
    data: DataOptions,
    *,
    init: Path | None,
    vae_name: str | None,
    encode: str,
    label_dropout: float,
    times: Literal["uniform", "logit-normal"],
    times_mean: float,
    label_std: float | None,
    **shape: Any,
) -> SitTask:
    """A SiT on latents; `shape` is what `network_options` ask for."""
    flow = FlowConfig(label_dropout, times, times_mean)
    if label_std is not None and not 0 <= label_std < math.inf:
        raise RequestError(
            f"--label-std is {label_std}", allowed="0, or a number above it", remedy="e.g. --label-std 0.5"
        )
    source = train_data.open_latent_source(run, data, vae_name, encode)
    preview_vae = _load_preview_vae(run, source, vae_name)
    model = load_network(init, "predictor").model if init else SiT(_build_network_config(source, **shape))
    model.requires_grad_(True)
    if label_std is not None:
        torch.nn.init.normal_(model.y_embedder.embedding_table.weight, std=label_std)
    return SitTask(model, source, flow, run.config.seed, vae=preview_vae, compile=run.config.compile, init=init)


def _build_network_config(
    source: LatentSource, *, model: str, num_classes: int, learned_sigma: bool, **shape: Any
) -> SiTConfig:
    """A released size, or one of width, depth, heads and patch, for the latents of a source."""
    channels, side, _ = source.manifest.shape
    shared: dict[str, Any] = {
        "classes": num_classes,
        "learned_sigma": learned_sigma,
        "in_channels": channels,
        "out_channels": channels,
    }
    try:
        return build_sit_config(model, side, **shared) if model else SiTConfig(latent_size=side, **shape, **shared)
    except ValueError as error:
        raise RequestError(
            str(error),
            allowed="a width divisible by the heads and by 4, a patch that divides the latent side; all above 0",
            remedy="change --width, --depth, --heads, --patch or --num-classes",
        ) from error


def build_refiner_task(
    run: RunOptions,
    data: DataOptions,
    *,
    predictor: Path,
    init: Path | None,
    vae_name: str | None,
    encode: str,
    steps_from: Path | None,
    **options: Any,
) -> RefinerTask:
    """A predictor's refiner on latents."""
    config = RefinerConfig(steps_from=str(steps_from) if steps_from else None, **options)
    steps = read_steps(steps_from) if steps_from else None
    teacher = load_network(predictor, "predictor").model
    source = train_data.open_latent_source(run, data, vae_name, encode)
    preview_vae = _load_preview_vae(run, source, vae_name)
    student = SiT(build_refiner_config(teacher.config))
    if init:
        student = load_network(init, "refiner").model.requires_grad_(True)
    return RefinerTask(
        student,
        teacher,
        source,
        config,
        run.config.seed,
        steps=steps,
        vae=preview_vae,
        compile=run.config.compile,
        files={"predictor": predictor, **({"init": init} if init else {})},
    )


def _load_preview_vae(run: RunOptions, source: LatentSource, vae_name: str | None) -> Vae | None:
    """What decodes the sample grids, if any are wanted."""
    return load_vae(vae_name or source.manifest.vae) if run.config.sample_every else None
