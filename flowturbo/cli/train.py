"""flowturbo-train: VAE, latents, SiT, refiner."""

from __future__ import annotations

from typing import Any

import click

from flowturbo.cli.train_options import (
    CacheOptions,
    DataOptions,
    LatentOptions,
    RefinerOptions,
    RunOptions,
    SitOptions,
    VaeOptions,
)
from flowturbo.training.config import LoopConfig
from runtime.cli.command_base import Group
from runtime.cli.dataclass_options import OptionDefaults, list_given_options, options

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=Group, purpose="training", extra="train", context_settings=CONTEXT)
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


@main.command()
@options(
    DataOptions,
    VaeOptions,
    OptionDefaults(RunOptions(config=LoopConfig(max_steps=10_000, batch_size=16, lr=1e-3, ema=0.999))),
)
def vae(data: DataOptions, network: VaeOptions, run: RunOptions) -> None:
    """Train a small KL autoencoder, or (--init … --preset ema|mse) another decoder for the latents of one."""
    from flowturbo.cli import train_tasks as tasks  # torch takes seconds, which --help and mistakes need not wait for

    given = list_given_options()
    tasks.run_task(run, data.out, lambda: tasks.build_vae_task(run, data, network, given))


@main.command("cache-latents")
@options(DataOptions, CacheOptions)
def cache_latents(data: DataOptions, cache: CacheOptions) -> None:
    """Encode photographs once, upright and mirrored. An interrupted call goes on where it stopped."""
    from flowturbo.cli import train_data

    photographs = train_data.load_photographs(data)
    train_data.say(
        f"{len(photographs)} photographs of {len(photographs.listing.names)} classes at {data.resolution} px"
    )
    if not cache.dry_run:
        train_data.encode_photographs(photographs, data.out, cache.vae_name, cache.device, cache.shard)


@main.command()
@options(
    DataOptions,
    LatentOptions,
    SitOptions,
    OptionDefaults(RunOptions(config=LoopConfig(max_steps=400_000, batch_size=256, lr=1e-4))),
)
def sit(data: DataOptions, latents: LatentOptions, network: SitOptions, run: RunOptions) -> None:
    """Train a SiT on cached latents or on photographs."""
    from flowturbo.cli import train_tasks as tasks

    given = list_given_options()
    tasks.run_task(run, data.out, lambda: tasks.build_sit_task(run, data, latents, network, given))


@main.command()
@options(
    DataOptions,
    LatentOptions,
    RefinerOptions,
    OptionDefaults(RunOptions(config=LoopConfig(max_steps=20_000, batch_size=256, lr=5e-5, explode=100.0))),
)
def refiner(data: DataOptions, latents: LatentOptions, network: RefinerOptions, run: RunOptions) -> None:
    """Train the velocity refiner of a SiT (FlowTurbo's objective)."""
    from flowturbo.cli import train_tasks as tasks

    tasks.run_task(run, data.out, lambda: tasks.build_refiner_task(run, data, latents, network))


if __name__ == "__main__":
    main()
