"""flowturbo-train: VAE, latents, SiT, refiner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from flowturbo.cli.train_options import (
    data_options,
    latent_options,
    loop_config,
    loop_options,
    network_options,
)
from flowturbo.training.config import LoopConfig
from runtime.cli.common import PATH, Group

if TYPE_CHECKING:
    from flowturbo.data import Photographs
    from flowturbo.latents import LatentSource


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Train a VAE, a SiT and its velocity refiner on folders of photographs.

    \b
    flowturbo-train vae --data DIR --out runs/vae --resolution 64 --max-steps 6000
    flowturbo-train cache-latents --data DIR --vae runs/vae/vae --resolution 64 --out runs/latents
    flowturbo-train sit --data runs/latents --out runs/sit --width 256 --depth 8 --heads 4 --patch 4 --max-steps 100000
    flowturbo-train refiner --data runs/latents --predictor runs/sit/final.safetensors --out runs/refiner
    torchrun --nproc-per-node 4 -m flowturbo.cli.train sit …        one process per GPU
    """


@main.result_callback()
def _leave(_: Any) -> None:
    from flowturbo.training.processes import leave_processes

    leave_processes()


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _say(line: str) -> None:
    click.echo(line, err=True)


def _execute(make_task: Callable[[], Any], config: LoopConfig, out: Path, resume: bool, dry_run: bool) -> None:
    import torch

    from flowturbo.training.loop import Run, train

    torch.manual_seed(config.seed)
    task = make_task()
    if dry_run:
        click.echo(json.dumps({**task.describe(), "loop": config.to_json()}, indent=2))
        return
    train(task, Run(out, config, resume))


def _photographs(data: Path, resolution: int, fraction: float, classes: str, seed: int) -> Photographs:
    from flowturbo.data import Photographs, list_photographs

    listing = list_photographs(data, fraction=fraction, classes=_words(classes), seed=seed)
    return Photographs(listing, resolution, report=_say)


@main.command()
@data_options
@click.option("--channels", default="32,64,96", show_default=True, help="Widths from full resolution down.")
@click.option("--layers", default=1, show_default=True, type=click.IntRange(1), help="Residual blocks per level.")
@click.option("--latent-channels", default=4, show_default=True, type=click.IntRange(1))
@click.option(
    "--crop", default=0, show_default=True, type=click.IntRange(0), help="Side of random training crops; 0: whole."
)
@click.option(
    "--preset",
    type=click.Choice(["ema", "mse"]),
    help="Fine-tune the decoder of --init: its encoder frozen, no --kl, no --equivariance, --loss l1 or mse.",
)
@click.option("--loss", default="l1", show_default=True, type=click.Choice(["l1", "mse"]))
@click.option(
    "--lpips",
    "lpips_files",
    multiple=True,
    type=PATH,
    help="Local weights of the perceptual distance, to add it to the loss: vgg16.pth and vgg.pth, or one of both.",
)
@click.option("--lpips-weight", default=1.0, show_default=True, help="Of the perceptual distance under --lpips.")
@click.option("--kl", default=1e-3, show_default=True, help="Weight of the KL divergence per latent element.")
@click.option("--equivariance", default=0.25, show_default=True, help="Share and weight of half-scale latents.")
@click.option("--init", type=PATH, help="Start from this VAE (diffusers folder) instead of from scratch.")
@click.option("--freeze-encoder", is_flag=True, help="Train the decoder only: a second decoder for the same latents.")
@loop_options(lr=1e-3, batch_size=16, ema=0.999, max_steps=10_000)
def vae(
    data: Path,
    out: Path,
    resolution: int,
    fraction: float,
    classes: str,
    channels: str,
    init: Path | None,
    preset: Literal["ema", "mse"] | None,
    lpips_files: tuple[Path, ...],
    lpips_weight: float,
    resume: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train a small KL autoencoder, or (--init … --preset ema|mse) another decoder for the latents of one."""
    config, context = loop_config(options), click.get_current_context()

    def make() -> Any:
        from flowturbo.training.lpips import load_lpips
        from flowturbo.training.vae import VaeConfig, VaeTask, new_vae, open_vae

        if preset:
            options.update(_preset(context, preset, init))
        weight = lpips_weight if lpips_files else 0.0
        vae_config = VaeConfig(channels=_widths(channels), lpips=weight, **options)
        photographs = _photographs(data, resolution, fraction, classes, config.seed)
        network = open_vae(init) if init else new_vae(vae_config, resolution)
        perceptual = load_lpips(lpips_files) if lpips_files else None
        return VaeTask(network, photographs, vae_config, config.seed, perceptual, init)

    _execute(make, config, out, resume, dry_run)


def _preset(context: click.Context, preset: str, init: Path | None) -> dict[str, Any]:
    """The options of a decoder's fine-tuning that were not given by hand."""
    from runtime.errors import RequestError

    if init is None:
        raise RequestError(
            f"--preset {preset} without --init",
            allowed="the VAE whose decoder is to be fine-tuned",
            remedy="--init DIR, a folder in diffusers layout",
        )
    wanted = {"freeze_encoder": True, "kl": 0.0, "equivariance": 0.0, "loss": {"ema": "l1", "mse": "mse"}[preset]}
    by_hand = {name for name in wanted if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    return {name: value for name, value in wanted.items() if name not in by_hand}


def _widths(text: str) -> tuple[int, ...]:
    from runtime.errors import RequestError

    try:
        return tuple(int(word) for word in _words(text))
    except ValueError as error:
        raise RequestError(
            f"--channels {text!r}", allowed="whole numbers separated by commas", remedy="e.g. --channels 32,64,96"
        ) from error


@main.command("cache-latents")
@data_options
@click.option("--vae", "vae_name", help="ema, mse, a folder in diffusers layout or a hub id; the demo's by default.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of --fraction.")
@click.option("--shard", default=2048, show_default=True, type=click.IntRange(1), help="Photographs per file.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--dry-run", is_flag=True, help="Say what would be encoded and stop.")
def cache_latents(
    data: Path,
    out: Path,
    resolution: int,
    fraction: float,
    classes: str,
    vae_name: str | None,
    seed: int,
    shard: int,
    device: Literal["auto", "cpu", "cuda"],
    dry_run: bool,
) -> None:
    """Encode photographs once, upright and mirrored. An interrupted call goes on where it stopped."""
    photographs = _photographs(data, resolution, fraction, classes, seed)
    _say(f"{len(photographs)} photographs of {len(photographs.listing.names)} classes at {resolution} px")
    if not dry_run:
        _cache(photographs, out, vae_name, device, shard)


def _cache(
    photographs: Photographs,
    out: Path,
    vae_name: str | None,
    device: Literal["auto", "cpu", "cuda"],
    shard: int = 2048,
) -> None:
    """Encodes into `out`; of many processes each writes its part of the shards."""
    from flowturbo.latents import build_cache
    from flowturbo.models.vae import load_vae
    from flowturbo.training.processes import join_processes

    accelerator, name = join_processes(device), _vae(vae_name)
    encoder = load_vae(name)
    encoder.module.to(accelerator.device)
    manifest = build_cache(
        out,
        photographs,
        encoder,
        name,
        shard=shard,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
        report=lambda done, total: _say(f"encoded {done}/{total}"),
    )
    if manifest.corrupt and accelerator.is_main_process:
        _say(f"skipped {len(manifest.corrupt)} corrupt files, e.g. {manifest.corrupt[0]}")


def _vae(name: str | None) -> str:
    from flowturbo.demo import VAES

    return name or str(VAES["ema"])


def _source(
    data: Path,
    out: Path,
    resolution: int,
    fraction: float,
    classes: str,
    vae: str | None,
    encode: str,
    config: LoopConfig,
    dry_run: bool,
) -> LatentSource:
    """The cache at `data`, or photographs: encoded into `out/latents` first, or (`on-the-fly`) when they are shown."""
    from flowturbo.latents import EncodedOnTheFly, Latents, is_cache
    from flowturbo.models.vae import load_vae

    if is_cache(data):
        latents = Latents(data, fraction=fraction, classes=_words(classes), seed=config.seed)
        _check_cache_options(latents.manifest.resolution, resolution, encode)
        return latents
    photographs = _photographs(data, resolution, fraction, classes, config.seed)
    if encode == "on-the-fly" or dry_run:  # a dry run writes nothing
        return EncodedOnTheFly(photographs, load_vae(_vae(vae)), _vae(vae))
    _cache(photographs, out / "latents", vae, config.device)
    return Latents(out / "latents")


def _check_cache_options(cached: int, resolution: int, encode: str) -> None:
    """Options that say how photographs are encoded are not silently ignored where --data holds latents."""
    from runtime.errors import RequestError

    by_hand = click.get_current_context().get_parameter_source("resolution") == ParameterSource.COMMANDLINE
    if by_hand and resolution != cached:
        raise RequestError(
            f"--resolution {resolution} with latents of {cached} pixels",
            allowed=f"{cached}, or no --resolution",
            remedy="make latents at this resolution: flowturbo-train cache-latents",
        )
    if encode == "on-the-fly":
        raise RequestError(
            "--encode on-the-fly with latents in --data",
            allowed="photographs in --data",
            remedy="leave --encode out, or name the folder of photographs",
        )


def _network_config(source: LatentSource, options: dict[str, Any]) -> Any:
    from flowturbo.models.sit import SiTConfig, named_config
    from runtime.errors import RequestError

    channels, side, _ = source.manifest.shape
    shared = {
        "classes": options.pop("num_classes"),
        "learned_sigma": options.pop("learned_sigma"),
        "in_channels": channels,
        "out_channels": channels,
    }
    shape = {name: options.pop(name) for name in ("depth", "width", "heads", "patch")}
    model = options.pop("model")
    try:
        return named_config(model, side, **shared) if model else SiTConfig(latent_size=side, **shape, **shared)
    except ValueError as error:
        raise RequestError(
            str(error),
            allowed="a width divisible by the heads and by 4, a patch that divides the latent side",
            remedy="change --width, --heads or --patch",
        ) from error


@main.command()
@data_options
@latent_options
@network_options
@click.option("--init", type=PATH, help="Start from this checkpoint's weights and shape instead of from scratch.")
@click.option(
    "--label-dropout", default=0.1, show_default=True, type=click.FloatRange(0, 1), help="Share without a label."
)
@click.option("--times", default="uniform", show_default=True, type=click.Choice(["uniform", "logit-normal"]))
@click.option("--label-std", type=float, help="Initial size of the label table, 0.02 as released; short runs want 0.5.")
@click.option("--times-mean", default=0.0, show_default=True, help="Of the normal number under --times logit-normal.")
@loop_options(lr=1e-4, batch_size=256, ema=0.9999, max_steps=400_000)
def sit(
    data: Path,
    out: Path,
    resolution: int,
    fraction: float,
    classes: str,
    init: Path | None,
    vae_name: str | None,
    encode: str,
    label_dropout: float,
    times: Literal["uniform", "logit-normal"],
    times_mean: float,
    label_std: float | None,
    resume: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train a SiT on cached latents or on photographs."""
    config = loop_config(options)

    def make() -> Any:
        import torch

        from flowturbo.checkpoints import load_network
        from flowturbo.models.sit import SiT
        from flowturbo.models.vae import load_vae
        from flowturbo.training.sit import FlowConfig, SitTask

        source = _source(data, out, resolution, fraction, classes, vae_name, encode, config, dry_run)
        shown_with = load_vae(vae_name or source.manifest.vae) if config.sample_every else None
        flow = FlowConfig(label_dropout, times, times_mean)
        model = load_network(init, "predictor").model if init else SiT(_network_config(source, options))
        model.requires_grad_(True)
        if label_std is not None:
            torch.nn.init.normal_(model.y_embedder.embedding_table.weight, std=label_std)
        return SitTask(model, source, flow, config.seed, vae=shown_with, compile=config.compile, init=init)

    _execute(make, config, out, resume, dry_run)


@main.command()
@data_options
@latent_options
@click.option("--predictor", required=True, type=PATH, help="Checkpoint of the SiT to refine.")
@click.option("--init", type=PATH, help="Start from this refiner.")
@click.option("--min-dt", default=0.0, show_default=True, help="Step sizes are uniform from this …")
@click.option("--max-dt", default=0.12, show_default=True, help="… to this.")
@click.option(
    "--steps-from",
    type=PATH,
    help='Draw (t, Δt) from the steps of a saved sampler (JSON with "grid") or of flowturbo-run\'s run.json instead.',
)
@click.option(
    "--label-dropout", default=0.1, show_default=True, type=click.FloatRange(0, 1), help="Share without a label."
)
@click.option("--reference-behaviour", is_flag=True, help="Let t + dt pass 1, as the released code does.")
@click.option(
    "--teacher-guidance", default=1.0, show_default=True, help="Learn to refine velocities guided at this scale."
)
@click.option(
    "--second-call",
    default="single",
    show_default=True,
    type=click.Choice(["single", "consistent"]),
    help="consistent: also train the second call of the consistent block.",
)
@loop_options(lr=5e-5, batch_size=256, ema=0.9999, max_steps=20_000, explode=100.0)
def refiner(
    data: Path,
    out: Path,
    resolution: int,
    fraction: float,
    classes: str,
    predictor: Path,
    init: Path | None,
    vae_name: str | None,
    encode: str,
    steps_from: Path | None,
    resume: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train the velocity refiner of a SiT (FlowTurbo's objective)."""
    config = loop_config(options)

    def make() -> Any:
        from flowturbo.checkpoints import load_network
        from flowturbo.models.sit import SiT, refiner_config
        from flowturbo.models.vae import load_vae
        from flowturbo.training.refiner import RefinerConfig, RefinerTask
        from flowturbo.training.steps import read_steps

        how = RefinerConfig(steps_from=str(steps_from) if steps_from else None, **options)
        steps = read_steps(steps_from) if steps_from else None
        teacher = load_network(predictor, "predictor").model
        source = _source(data, out, resolution, fraction, classes, vae_name, encode, config, dry_run)
        shown_with = load_vae(vae_name or source.manifest.vae) if config.sample_every else None
        student = SiT(refiner_config(teacher.config))
        if init:
            student = load_network(init, "refiner").model.requires_grad_(True)
        files = {"predictor": predictor, **({"init": init} if init else {})}
        return RefinerTask(
            student, teacher, source, how, config.seed, steps=steps, vae=shown_with, compile=config.compile, files=files
        )

    _execute(make, config, out, resume, dry_run)


if __name__ == "__main__":
    main()
