"""flowturbo-train: VAE, SiT and refiner, and the latents they share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from flowturbo.training.config import LoopConfig
from runtime.cli.common import Group

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Train a VAE, a SiT and its velocity refiner on folders of photographs.

    \b
    flowturbo-train vae --data DIR --out runs/vae --resolution 64 --max-steps 6000
    flowturbo-train cache-latents --data DIR --vae runs/vae/vae --resolution 64 --out runs/latents
    flowturbo-train sit --data runs/latents --out runs/sit --width 256 --depth 8 --heads 4 --patch 4 --max-steps 100000
    flowturbo-train refiner --data runs/latents --predictor runs/sit/final.safetensors --out runs/refiner
    """


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def data_options(function: F) -> F:
    """What to train on, and where the run goes."""
    return _stack(
        click.option("--data", required=True, type=FOLDER, help="Folder of class folders, or of cached latents."),
        click.option("--out", required=True, type=FOLDER, help="Folder of the run."),
        click.option("--resolution", default=256, show_default=True, type=click.IntRange(8), help="Pixels a side."),
        click.option("--fraction", default=1.0, show_default=True, help="Share of every class to use."),
        click.option("--classes", default="", help="Folder names or labels to use, separated by commas."),
    )(function)


def loop_options(*, lr: float, batch_size: int, ema: float, max_steps: int) -> Callable[[F], F]:
    """The loop's options, with the defaults that suit what is trained."""

    def option(*names: str, default: Any, help: str, **kinds: Any) -> Callable[[F], F]:
        return click.option(*names, default=default, show_default=True, help=help, **kinds)

    schedules = click.Choice(["constant", "cosine", "linear"])
    return _stack(
        option("--batch-size", default=batch_size, help="Samples of one step."),
        option("--max-steps", default=max_steps, help="Steps in all, resumed ones included."),
        option("--lr", default=lr, help="Peak learning rate."),
        option("--lr-schedule", "schedule", default="constant", type=schedules, help="After the warm-up."),
        option("--warmup", default=0, help="Steps over which the learning rate rises."),
        option("--decay", default=0, help="Last steps over which a constant learning rate falls to 0."),
        option("--optimizer", default="adamw", type=click.Choice(["adamw", "muon"]), help="Of the hidden matrices."),
        option("--muon-lr", default=1e-3, help="Peak learning rate of the matrices under --optimizer muon."),
        option("--weight-decay", default=0.0, help="Decoupled weight decay."),
        option("--clip", default=1.0, help="Largest norm of the gradient."),
        option("--ema", default=ema, help="Decay of the averaged weights."),
        option("--precision", default="fp32", type=click.Choice(["fp32", "bf16"]), help="bf16: autocast."),
        option("--compile/--no-compile", default=False, help="torch.compile the networks."),
        option("--checkpoint-every", default=1000, help="Steps between checkpoints."),
        option("--keep", default=3, help="Checkpoints kept."),
        option("--sample-every", default=0, help="Steps between sample grids; 0 for none."),
        option("--seed", default=0, help="Of the weights and of everything drawn."),
        click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out."),
        click.option("--dry-run", is_flag=True, help="Print the resolved configuration and stop."),
    )


_LOOP = tuple(LoopConfig.__dataclass_fields__)


def _loop_config(options: dict[str, Any]) -> LoopConfig:
    """Takes the loop's options out of `options`."""
    return LoopConfig(**{name: options.pop(name) for name in _LOOP})


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _execute(make_task: Callable[[], Any], config: LoopConfig, out: Path, resume: bool, dry_run: bool) -> None:
    import torch

    from flowturbo.training.loop import Run, train

    torch.manual_seed(config.seed)
    task = make_task()
    if dry_run:
        click.echo(json.dumps({**task.describe(), "loop": config.to_json()}, indent=2))
        return
    train(task, Run(out, config, resume))


@main.command()
@data_options
@click.option("--channels", default="32,64,96", show_default=True, help="Widths from full resolution down.")
@click.option("--layers", default=1, show_default=True, help="Residual blocks per level.")
@click.option("--latent-channels", default=4, show_default=True)
@click.option("--crop", default=0, show_default=True, help="Side of random training crops; 0: whole photographs.")
@click.option("--loss", default="l1", show_default=True, type=click.Choice(["l1", "mse"]))
@click.option("--kl", default=1e-3, show_default=True, help="Weight of the KL divergence per latent element.")
@click.option("--equivariance", default=0.25, show_default=True, help="Share and weight of half-scale latents.")
@click.option("--init", type=FOLDER, help="Start from this VAE (diffusers folder) instead of from scratch.")
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
    loss: Literal["l1", "mse"],
    resume: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train a small KL autoencoder, or (--init … --freeze-encoder) another decoder for one."""
    config = _loop_config(options)

    def make() -> Any:
        from flowturbo.data import Photographs, list_photographs
        from flowturbo.training.vae import VaeConfig, VaeTask, new_vae, open_vae

        listing = list_photographs(data, fraction=fraction, classes=_words(classes), seed=config.seed)
        widths = tuple(int(word) for word in _words(channels))
        vae_config = VaeConfig(channels=widths, loss=loss, **options)
        network = open_vae(init) if init else new_vae(vae_config, resolution)
        return VaeTask(network, Photographs(listing, resolution), vae_config, config.seed)

    _execute(make, config, out, resume, dry_run)


@main.command("cache-latents")
@data_options
@click.option("--vae", "vae_name", help="ema, mse, a folder in diffusers layout or a hub id; the demo's by default.")
@click.option("--seed", default=0, show_default=True, help="Of --fraction.")
@click.option("--shard", default=2048, show_default=True, type=click.IntRange(1), help="Photographs per file.")
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
    dry_run: bool,
) -> None:
    """Encode photographs once, upright and mirrored. An interrupted call goes on where it stopped."""
    from flowturbo.data import list_photographs

    listing = list_photographs(data, fraction=fraction, classes=_words(classes), seed=seed)
    click.echo(f"{len(listing)} photographs of {len(listing.names)} classes at {resolution} px", err=True)
    if not dry_run:
        _cache(data, out, resolution, fraction, tuple(_words(classes)), vae_name, seed, shard)


def _cache(
    data: Path,
    out: Path,
    resolution: int,
    fraction: float,
    classes: tuple[str, ...],
    vae: str | None,
    seed: int,
    shard: int,
) -> None:
    from flowturbo.data import Photographs, list_photographs
    from flowturbo.demo import VAES
    from flowturbo.latents import build_cache
    from flowturbo.models.vae import load_vae

    vae = vae or str(VAES["ema"])
    listing = list_photographs(data, fraction=fraction, classes=classes, seed=seed)
    manifest = build_cache(
        out,
        Photographs(listing, resolution),
        load_vae(vae),
        vae,
        fraction=fraction,
        classes=classes,
        seed=seed,
        shard=shard,
        report=lambda done, total: click.echo(f"encoded {done}/{total}", err=True),
    )
    if manifest.corrupt:
        click.echo(f"skipped {len(manifest.corrupt)} corrupt files, e.g. {manifest.corrupt[0]}", err=True)


def _latents(data: Path, out: Path, resolution: int, fraction: float, classes: str, vae: str | None, seed: int) -> Any:
    """The cache at `data`; or photographs at `data` are encoded into `out/latents` first."""
    from flowturbo.latents import Latents, is_cache

    if is_cache(data):
        return Latents(data)
    _cache(data, out / "latents", resolution, fraction, tuple(_words(classes)), vae, seed, 2048)
    return Latents(out / "latents")


def network_options(function: F) -> F:
    """Shape of a new SiT."""
    return _stack(
        click.option("--model", default="", help="A released size, e.g. SiT-B/2, instead of the four below."),
        click.option("--width", default=256, show_default=True),
        click.option("--depth", default=8, show_default=True),
        click.option("--heads", default=4, show_default=True),
        click.option("--patch", default=2, show_default=True),
        click.option("--num-classes", default=1000, show_default=True, help="Rows of the label table."),
        click.option(
            "--learned-sigma/--no-learned-sigma", default=True, show_default=True, help="As the released SiT."
        ),
    )(function)


def _network_config(latents: Any, options: dict[str, Any]) -> Any:
    from flowturbo.models.sit import SiTConfig, named_config
    from runtime.errors import RequestError

    channels, side, _ = latents.shape
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
@network_options
@click.option("--init", type=FOLDER, help="Start from this checkpoint's weights and shape instead of from scratch.")
@click.option(
    "--vae", "vae_name", help="ema, mse, a folder or hub id; the demo's by default. Encodes photographs in --data."
)
@click.option("--label-dropout", default=0.1, show_default=True, help="Share of samples without a label.")
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
    label_dropout: float,
    times: Literal["uniform", "logit-normal"],
    times_mean: float,
    label_std: float | None,
    resume: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train a SiT on cached latents, or on photographs, which are then encoded into OUT/latents first."""
    config = _loop_config(options)

    def make() -> Any:
        import torch

        from flowturbo.checkpoints import load_network
        from flowturbo.models.sit import SiT
        from flowturbo.models.vae import load_vae
        from flowturbo.training.sit import FlowConfig, SitTask

        latents = _latents(data, out, resolution, fraction, classes, vae_name, config.seed)
        shown_with = load_vae(latents.manifest.vae) if config.sample_every else None
        flow = FlowConfig(label_dropout, times, times_mean)
        model = load_network(init, "predictor").model if init else SiT(_network_config(latents, options))
        model.requires_grad_(True)
        if label_std is not None:
            torch.nn.init.normal_(model.y_embedder.embedding_table.weight, std=label_std)
        return SitTask(model, latents, flow, config.seed, shown_with, config.compile)

    _execute(make, config, out, resume, dry_run)


@main.command()
@data_options
@click.option("--predictor", required=True, type=FOLDER, help="Checkpoint of the SiT to refine.")
@click.option("--init", type=FOLDER, help="Start from this refiner.")
@click.option(
    "--vae", "vae_name", help="ema, mse, a folder or hub id; the demo's by default. Encodes photographs in --data."
)
@click.option("--max-dt", default=0.12, show_default=True, help="Step sizes are uniform from 0 to this.")
@click.option("--label-dropout", default=0.1, show_default=True, help="Share of samples without a label.")
@click.option("--reference-behaviour", is_flag=True, help="Let t + dt pass 1, as the released code does.")
@loop_options(lr=5e-5, batch_size=256, ema=0.9999, max_steps=20_000)
def refiner(
    data: Path,
    out: Path,
    resolution: int,
    fraction: float,
    classes: str,
    predictor: Path,
    init: Path | None,
    vae_name: str | None,
    max_dt: float,
    label_dropout: float,
    reference_behaviour: bool,
    resume: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train the velocity refiner of a SiT (FlowTurbo's objective)."""
    config = _loop_config(options)

    def make() -> Any:
        from flowturbo.checkpoints import load_network
        from flowturbo.models.sit import SiT, refiner_config
        from flowturbo.training.refiner import RefinerConfig, RefinerTask

        teacher = load_network(predictor, "predictor").model
        latents = _latents(data, out, resolution, fraction, classes, vae_name, config.seed)
        student = SiT(refiner_config(teacher.config))
        if init:
            student.load_state_dict(load_network(init, "refiner").model.state_dict())
        how = RefinerConfig(max_dt, label_dropout, reference_behaviour)
        return RefinerTask(student, teacher, latents, how, config.seed, config.compile)

    _execute(make, config, out, resume, dry_run)


if __name__ == "__main__":
    main()
