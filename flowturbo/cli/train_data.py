"""From `flowturbo-train`'s options to what is trained on: photographs, cached latents, or latents made on the way."""

from __future__ import annotations

from pathlib import Path

import click

from flowturbo.cli.train_options import DataOptions, RunOptions
from flowturbo.data.latents import CachedLatents, LatentSource, OnTheFlyLatents, build_cache, is_cache
from flowturbo.data.photographs import Photographs, list_photographs
from flowturbo.demo import VAES
from flowturbo.models.vae import load_vae
from flowturbo.training.processes import DeviceName, join_processes
from runtime.system.errors import RequestError
from runtime.system.progress import Progress

SHARD_SIZE = 2048
"""Photographs of a file of latents."""


def say(line: str) -> None:
    """Tells it on stderr."""
    click.echo(line, err=True)


class _StderrLines(Progress):
    """Lines on stderr that stay: the loop of a training prints its own there too."""

    def write(self, text: str) -> None:
        say(text)

    def update(self, task: str, done: int, total: int) -> None:
        say(f"{task} {done}/{total}")


def load_photographs(data: DataOptions) -> Photographs:
    """Those that were asked for; files that cannot be read are told of."""
    if is_cache(data.folder):
        raise RequestError(
            f"--data {data.folder} holds latents", allowed="photographs", remedy="name the folder they were made from"
        )
    listing = list_photographs(data.folder, fraction=data.fraction, classes=data.classes, seed=data.seed)
    return Photographs(listing, data.resolution, progress=_StderrLines())


def encode_photographs(
    photographs: Photographs, out: Path, vae_name: str | None, device: DeviceName, shard: int = SHARD_SIZE
) -> None:
    """Encodes into `out`; of many processes each writes its part of the shards."""
    accelerator, encoder_name = join_processes(device), _resolve_vae_name(vae_name)
    encoder = load_vae(encoder_name)
    encoder.module.to(accelerator.device)
    manifest = build_cache(
        out,
        photographs,
        encoder,
        encoder_name,
        shard=shard,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
        progress=_StderrLines(),
    )
    if manifest.corrupt and accelerator.is_main_process:
        say(f"skipped {len(manifest.corrupt)} corrupt files, e.g. {manifest.corrupt[0]}")


def open_latent_source(run: RunOptions, data: DataOptions, vae_name: str | None, encode: str) -> LatentSource:
    """The cache that was named, or photographs: encoded into `out/latents` first, or (`on-the-fly`) when shown."""
    if is_cache(data.folder):
        cached = CachedLatents(data.folder, fraction=data.fraction, classes=data.classes, seed=data.seed)
        _check_fits_cache(data, cached.manifest.resolution, encode)
        return cached
    photographs = load_photographs(data)
    if encode == "on-the-fly" or run.dry_run:  # a dry run writes nothing
        return OnTheFlyLatents(photographs, load_vae(_resolve_vae_name(vae_name)), _resolve_vae_name(vae_name))
    encode_photographs(photographs, run.out / "latents", vae_name, run.config.device)
    return CachedLatents(run.out / "latents")


def _check_fits_cache(data: DataOptions, cached_resolution: int, encode: str) -> None:
    """Options that say how photographs are encoded are not silently ignored where --data holds latents."""
    if data.is_resolution_explicit and data.resolution != cached_resolution:
        raise RequestError(
            f"--resolution {data.resolution} with latents of {cached_resolution} pixels",
            allowed=f"{cached_resolution}, or no --resolution",
            remedy="make latents at this resolution: flowturbo-train cache-latents",
        )
    if encode == "on-the-fly":
        raise RequestError(
            "--encode on-the-fly with latents in --data",
            allowed="photographs in --data",
            remedy="leave --encode out, or name the folder of photographs",
        )


def _resolve_vae_name(name: str | None) -> str:
    return name or str(VAES["ema"])
