"""flowturbo-train: VAE, latents, SiT, refiner."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import click

from flowturbo.cli.train_options import (
    cache_options,
    data_options,
    flow_options,
    latent_options,
    list_explicit_options,
    loop_options,
    network_options,
    parse_data_options,
    parse_run_options,
    refiner_options,
    vae_options,
)
from runtime.cli.command_base import Group
from runtime.system.errors import TrainingError


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
def _end_processes(_: Any) -> None:
    from flowturbo.training.processes import leave_processes

    leave_processes()


def _import_tasks() -> ModuleType:
    """What the commands do, imported when one runs: torch takes seconds, and --help and mistakes need none of it.

    Raises:
        TrainingError: the packages of the train extra are missing.
    """
    try:
        from flowturbo.cli import train_tasks
    except ImportError as error:
        raise TrainingError(
            f"training needs {error.name or error}, which is not installed", remedy="pip install 'flowturbo[train]'"
        ) from error
    return train_tasks


@main.command()
@data_options
@vae_options
@loop_options(lr=1e-3, batch_size=16, ema=0.999, max_steps=10_000)
def vae(**options: Any) -> None:
    """Train a small KL autoencoder, or (--init … --preset ema|mse) another decoder for the latents of one."""
    run = parse_run_options(options)
    data, explicit_options, tasks = (
        parse_data_options(options, run.out, run.config.seed),
        list_explicit_options(),
        _import_tasks(),
    )
    tasks.run_task(run, lambda: tasks.build_vae_task(run, data, explicit_options, **options))


@main.command("cache-latents")
@data_options
@cache_options
def cache_latents(**options: Any) -> None:
    """Encode photographs once, upright and mirrored. An interrupted call goes on where it stopped."""
    data = parse_data_options(options, options["out"], options.pop("seed"))
    _import_tasks().run_caching(data, **options)


@main.command()
@data_options
@latent_options
@network_options
@flow_options
@loop_options(lr=1e-4, batch_size=256, ema=0.9999, max_steps=400_000)
def sit(**options: Any) -> None:
    """Train a SiT on cached latents or on photographs."""
    run = parse_run_options(options)
    data, tasks = parse_data_options(options, run.out, run.config.seed), _import_tasks()
    tasks.run_task(run, lambda: tasks.build_sit_task(run, data, **options))


@main.command()
@data_options
@latent_options
@refiner_options
@loop_options(lr=5e-5, batch_size=256, ema=0.9999, max_steps=20_000, explode=100.0)
def refiner(**options: Any) -> None:
    """Train the velocity refiner of a SiT (FlowTurbo's objective)."""
    run = parse_run_options(options)
    data, tasks = parse_data_options(options, run.out, run.config.seed), _import_tasks()
    tasks.run_task(run, lambda: tasks.build_refiner_task(run, data, **options))


if __name__ == "__main__":
    main()
