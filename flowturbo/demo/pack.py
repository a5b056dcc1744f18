"""python -m flowturbo.demo.pack: put trained networks into the package, in half precision.

The last step of docs/demo-model.md.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL

from flowturbo import demo
from flowturbo.checkpoints import Role, load_network, save_network
from runtime.cli.command_base import PATH, Command
from runtime.system.files import make_folder

FILE = click.Path(path_type=Path, exists=True)


def _pack_network(source: Path, role: Role, target: Path, guidance: float, schedule: str) -> None:
    network = load_network(source, role)
    metadata = {key: value for key, value in network.metadata.items() if key not in ("role", "config", "vae")}
    save_network(
        target, network.model.half(), role=role, extra={**metadata, "guidance": guidance, "schedule": schedule}
    )


@click.command(cls=Command)
@click.option("--predictor", required=True, type=FILE, help="Finished, or a checkpoint of a run: its average.")
@click.option("--refiner", type=FILE)
@click.option("--vae-ema", type=FILE, help="Folder in diffusers layout.")
@click.option("--vae-mse", type=FILE, help="Folder in diffusers layout.")
@click.option("--guidance", required=True, type=float, help="Default guidance of the demo.")
@click.option("--schedule", default="H1P5R3", show_default=True, help="Default schedule of the demo.")
@click.option("--out", default=demo.FOLDER, type=PATH, help="[default: the package's own folder]")
def main(
    predictor: Path,
    refiner: Path | None,
    vae_ema: Path | None,
    vae_mse: Path | None,
    guidance: float,
    schedule: str,
    out: Path,
) -> None:
    """Replace the demo model's weights."""
    make_folder(out)
    _pack_network(predictor, "predictor", out / demo.PREDICTOR.name, guidance, schedule)
    if refiner is not None:
        _pack_network(refiner, "refiner", out / demo.REFINER.name, guidance, schedule)
    for name, source in (("ema", vae_ema), ("mse", vae_mse)):
        if source is not None:
            AutoencoderKL.from_pretrained(source, torch_dtype=torch.float16).save_pretrained(out / demo.VAES[name].name)
    files = [f for f in out.rglob("*") if f.suffix in (".safetensors", ".json")]
    for file in files:
        file.chmod(0o644)  # safetensors writes them for the owner only, and the wheel keeps that
    total = sum(file.stat().st_size for file in files)
    click.echo(f"{out}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
