"""From `flowturbo-train`'s options to what the loop trains, and the start of it. Imports torch; the options do not."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click
import torch

from flowturbo.checkpoints import load_network, resize_network
from flowturbo.cli import train_data
from flowturbo.cli.train_options import DataOptions, LatentOptions, RefinerOptions, RunOptions, SitOptions, VaeOptions
from flowturbo.data.latents import LatentSource
from flowturbo.models.sit import MODEL_NAMES, LabelEmbedder, SiT, SiTConfig, build_refiner_config, build_sit_config
from flowturbo.models.vae import Vae, load_vae
from flowturbo.training.config import VaeConfig
from flowturbo.training.loop import TrainingRun, TrainingTask, train
from flowturbo.training.lpips import load_lpips
from flowturbo.training.refiner_task import RefinerTask, read_steps
from flowturbo.training.sit_task import SitTask, check_null_label
from flowturbo.training.vae_task import VaeTask, build_vae, load_trainable_vae
from runtime.system.errors import RequestError

LABEL_STD = 0.02
"""Initial size of the label table, as released."""
PRESET_LOSSES: dict[str, Literal["l1", "mse"]] = {"ema": "l1", "mse": "mse"}


def run_task(run: RunOptions, out: Path, make_task: Callable[[], TrainingTask]) -> None:
    """Train what `make_task` gives, or print what would be trained; its weights come from the run's seed."""
    torch.manual_seed(run.config.seed)
    task = make_task()
    if run.dry_run:
        click.echo(json.dumps({**task.describe(), "loop": run.config.to_json()}, indent=2))
        return
    train(task, TrainingRun(out, run.config, run.resume))


def build_vae_task(run: RunOptions, data: DataOptions, network: VaeOptions, given: Collection[str]) -> VaeTask:
    """Return the task of an autoencoder on photographs; a preset leaves what was `given` by hand.

    Raises:
        RequestError: a preset without --init, or a shape that is not that of --init.
    """
    config, init = network.config, network.init
    if network.preset is not None:
        if init is None:
            raise RequestError(
                f"--preset {network.preset} without --init",
                allowed="the VAE whose decoder is to be fine-tuned",
                remedy="--init DIR, a folder in diffusers layout",
            )
        preset = VaeConfig(freeze_encoder=True, kl=0.0, equivariance=0.0, loss=PRESET_LOSSES[network.preset])
        for name in {"freeze_encoder", "kl", "equivariance", "loss"} - set(given):
            config = replace(config, **{name: getattr(preset, name)})
    config = replace(config, lpips=network.lpips_weight if network.lpips_files else 0.0)
    photographs = train_data.load_photographs(data)
    autoencoder = load_trainable_vae(init) if init else build_vae(config, data.resolution)
    for flag, key in (
        ("channels", "block_out_channels"),
        ("layers", "layers_per_block"),
        ("latent_channels", "latent_channels"),
    ):
        wanted, actual = getattr(config, flag), getattr(autoencoder.config, key)
        wanted, actual = (tuple(value) if isinstance(value, (list, tuple)) else (value,) for value in (wanted, actual))
        if init and flag in given and wanted != actual:
            raise RequestError(
                f"--{flag.replace('_', '-')} {','.join(map(str, wanted))} beside --init {init}",
                allowed=f"the shape of that VAE: {','.join(map(str, actual))}",
                remedy="leave the option out, or leave --init out to train from scratch",
            )
    perceptual = load_lpips(network.lpips_files) if network.lpips_files else None
    return VaeTask(autoencoder, photographs, config, run.config.seed, perceptual, init)


def build_sit_task(
    run: RunOptions, data: DataOptions, latents: LatentOptions, network: SitOptions, given: Collection[str] = ()
) -> SitTask:
    """Return the task of a SiT on latents; `given` names the options that were given by hand."""
    label_std = network.label_std
    shape_flags = [f"--{name}" for name in ("model", "width", "depth", "heads", "patch") if name in given]
    if network.model in MODEL_NAMES and len(shape_flags) > 1:
        raise RequestError(
            f"{', '.join(shape_flags)} together",
            allowed="--model, or the shape by its options",
            remedy="leave --model out, or the others",
        )
    shape_flags += [f"--{'' if network.learned_sigma else 'no-'}learned-sigma"] if "learned_sigma" in given else []
    if network.init and shape_flags:
        raise RequestError(
            f"{', '.join(shape_flags)} beside --init {network.init}",
            allowed="the shape of that checkpoint; --num-classes makes a fresh label table",
            remedy="leave them out, or leave --init out to train from scratch",
        )
    if label_std is not None and not 0 <= label_std < math.inf:
        raise RequestError(
            f"--label-std is {label_std}", allowed="0, or a number above it", remedy="e.g. --label-std 0.5"
        )
    source = train_data.open_latent_source(run, data, latents)
    preview_vae = _load_preview_vae(run, source, latents)
    if network.init:
        model, fresh = _load_initial_network(
            network.init, source, network.num_classes if "num_classes" in given else None
        )
    else:
        model, fresh = SiT(_build_network_config(source, network)), ()
    check_null_label(model.config)
    model.requires_grad_(True)
    if label_std is not None:
        torch.nn.init.normal_(model.y_embedder.embedding_table.weight, std=label_std)
    return SitTask(
        model,
        source,
        network.flow,
        run.config.seed,
        vae=preview_vae,
        compile=run.config.compile,
        init=network.init,
        fresh=fresh,
    )


def _load_initial_network(path: Path, source: LatentSource, num_classes: int | None) -> tuple[SiT, tuple[str, ...]]:
    """Load the network of --init for the latents of a source, and name its parts that start afresh.

    Args:
        path: of the checkpoint.
        source: latents of another side get fresh positions.
        num_classes: rows of a fresh label table, beside the null label; None keeps the file's table.
    """
    model, (_, side, _) = load_network(path, "predictor").model, source.manifest.shape
    previous = model.config
    try:
        config = replace(previous, latent_size=side)
        if num_classes is not None:
            config = replace(config, classes=num_classes, has_null_label=True)
    except ValueError as error:
        raise RequestError(
            f"--init {path}: {error}",
            allowed=f"latents of a side that {previous.patch} divides, its patch; --num-classes 1 or more",
            remedy="make latents at another resolution: flowturbo-train cache-latents --resolution N",
        ) from error
    fresh: tuple[str, ...] = ()
    if side != previous.latent_size:
        model, fresh = resize_network(model, side), ("positions",)
        train_data.say(f"fresh positions: latents of {side}², where {path} had {previous.latent_size}²")
    if num_classes is not None:
        model.y_embedder, fresh = LabelEmbedder(num_classes + 1, config.width), (*fresh, "label table")
        torch.nn.init.normal_(model.y_embedder.embedding_table.weight, std=LABEL_STD)
        model.config = config
        train_data.say(f"fresh label table: {num_classes} classes, where {path} had {previous.classes}")
    return model, fresh


def _build_network_config(source: LatentSource, network: SitOptions) -> SiTConfig:
    """A released size, or one of width, depth, heads and patch, for the latents of a source."""
    channels, side, _ = source.manifest.shape
    try:
        config = (
            build_sit_config(network.model, side)
            if network.model
            else SiTConfig(
                latent_size=side, width=network.width, depth=network.depth, heads=network.heads, patch=network.patch
            )
        )
        return replace(
            config,
            classes=network.num_classes,
            learned_sigma=network.learned_sigma,
            in_channels=channels,
            out_channels=channels,
        )
    except ValueError as error:
        raise RequestError(
            str(error),
            allowed="a width divisible by the heads and by 4, a patch that divides the latent side; all above 0",
            remedy="change --width, --depth, --heads, --patch or --num-classes",
        ) from error


def build_refiner_task(
    run: RunOptions, data: DataOptions, latents: LatentOptions, network: RefinerOptions
) -> RefinerTask:
    """Return the task of a predictor's refiner on latents."""
    steps_from = network.config.steps_from
    steps = read_steps(Path(steps_from)) if steps_from else None
    predictor = load_network(network.predictor, "predictor")
    teacher, is_null_trained = predictor.model, predictor.metadata.get("label_dropout") != 0
    if network.config.teacher_guidance != 1 and not is_null_trained:
        warnings.warn(
            f"--teacher-guidance {network.config.teacher_guidance:g}: {network.predictor} was trained with "
            "--label-dropout 0, so its null label, which guidance moves away from, has not been learned",
            stacklevel=1,
        )
    source = train_data.open_latent_source(run, data, latents)
    preview_vae = _load_preview_vae(run, source, latents)
    if network.init:
        student = load_network(network.init, "refiner").model.requires_grad_(True)
    else:
        student = SiT(build_refiner_config(teacher.config))
    for config in (teacher.config, student.config):
        check_null_label(config)
    return RefinerTask(
        student,
        teacher,
        source,
        network.config,
        run.config.seed,
        steps=steps,
        vae=preview_vae,
        compile=run.config.compile,
        files={"predictor": network.predictor, **({"init": network.init} if network.init else {})},
        is_null_trained=is_null_trained,
    )


def _load_preview_vae(run: RunOptions, source: LatentSource, latents: LatentOptions) -> Vae | None:
    """What decodes the sample grids, if any are wanted."""
    return load_vae(latents.vae_name or source.manifest.vae) if run.config.sample_every else None
