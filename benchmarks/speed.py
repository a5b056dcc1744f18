"""python -m benchmarks.speed SiT-B/2 --work FOLDER: ONNX Runtime on the CPU against PyTorch, in turns, in one process.

One guided evaluation (an Euler step) and a whole picture (a schedule and the decoder), from the same weights, noise and
labels; both must end in the same latents. A network's share of the machine is its multiplications over a measured
matrix product's. Weights are random, of the released sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.models import build_engines, write_checkpoints
from benchmarks.rounds import Condition, Times, interleaved, ratio
from export.proof.reference import rows_velocity
from flowturbo.checkpoints import load_network
from flowturbo.models.sit import MODELS, SiT
from flowturbo.models.vae import Vae, load_vae
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.execution.fixed_loop import Usage
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.sampling.guidance import guided_rows
from runtime.sampling.noise import noise_of_seeds
from runtime.sampling.plan import integrate
from runtime.system.errors import ProofError
from runtime.system.hardware import cpu

Floats = NDArray[np.float32]
TORCH = {
    "eager fp32": (False, torch.float32),
    "compiled fp32": (True, torch.float32),
    "eager bf16": (False, torch.bfloat16),
    "compiled bf16": (True, torch.bfloat16),
}
ENGINE = "onnxruntime fp32"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Of the latents at the end: the root mean square of the difference over that of the values."""


class Reference:
    """The same sampler in PyTorch: a predictor, a refiner and a VAE, in one condition of `TORCH`."""

    def __init__(self, predictor: SiT, refiner: SiT, vae: Vae, compiled: bool, dtype: torch.dtype) -> None:
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda module: module
        self._predictor, self._refiner, self._decode = wrap(predictor), wrap(refiner), wrap(vae.decode)
        self._dtype = dtype

    def latents(self, request: Request, noise: Floats, null_label: int) -> Floats:
        rows = guided_rows(request.labels, request.scales, null_label, noise.shape[1], request.guidance_channels)
        predict, refine = rows_velocity(self._predictor, rows), rows_velocity(self._refiner, rows)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            end = integrate(
                request.sampler.plan,
                torch.from_numpy(noise),
                lambda x, t: predict(x, t, None).float(),
                lambda x, t, v, add: refine(x, t, v).float() + add,
            )
        found: Floats = end.numpy()
        return found

    def picture(self, latents: Floats) -> Floats:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            pixels: Floats = self._decode(torch.from_numpy(latents)).float().numpy()
        return pixels


def macs(model: SiT) -> float:
    """Multiply-adds of one row: matrix products and attention."""
    config = model.config
    tokens = (config.latent_size // config.patch) ** 2
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "adaLN" not in name and "embedder" not in name
    )
    return tokens * (linear + 2 * tokens * config.width * config.depth)


def product_rate(side: int = 2048, repeats: int = 5) -> float:
    """Multiply-adds a second of a large float32 matrix product, the best of NumPy's and PyTorch's."""
    a = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    t = torch.from_numpy(a)
    times = interleaved({"numpy": lambda: a @ a, "torch": lambda: t @ t}, repeats)
    return side**3 / min(min(each.seconds) for each in times.values())


def check_same(name: str, found: Floats, expected: Floats, allowed: float) -> float:
    """Relative error of latents.

    Raises:
        ProofError: they are not the same picture's.
    """
    error = float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
    if not error <= allowed:
        raise ProofError(f"the latents of {name} are off by {error:.1e}", allowed=f"{allowed:g}")
    return error


def measure(name: str, work: Path, conditions: list[str], schedule: str, rounds: int) -> dict[str, Any]:
    """Times and agreement of one model size."""
    files, folder = write_checkpoints(work, name), build_engines(work, name)
    predictor, refiner = (
        load_network(path, role).model  # type: ignore[arg-type]
        for path, role in ((files.predictor, "predictor"), (files.refiner, "refiner"))
    )
    vae = load_vae(str(files.vae))
    torch.set_num_threads(cpu().physical_cores)
    references = {name: Reference(predictor, refiner, vae, *TORCH[name]) for name in conditions}
    with Pipeline.load(folder, provider="cpu") as pipeline:
        null = pipeline.manifest.model.null_label
        noise = noise_of_seeds([0], (4, 32, 32))
        step, whole = (
            pipeline.request(207, **options) for options in ({"solver": "euler", "steps": 1}, {"schedule": schedule})
        )
        step = replace(step, vae=None)

        def engine(request: Request) -> Floats:
            return pipeline.run(request, noise=noise).latents

        agreement = {
            other: check_same(other, engine(whole), reference.latents(whole, noise, null), TOLERANCE[TORCH[other][1]])
            for other, reference in references.items()
        }
        evaluation: dict[str, Condition] = {ENGINE: lambda: engine(step)}
        picture: dict[str, Condition] = {ENGINE: lambda: engine(whole)}
        decoder: dict[str, Condition] = {ENGINE: lambda: pipeline.decoders.decode(noise, str(whole.vae), Usage())}
        for other, reference in references.items():
            evaluation[other] = lambda r=reference: r.latents(step, noise, null)  # type: ignore[misc]
            picture[other] = lambda r=reference: r.picture(r.latents(whole, noise, null))  # type: ignore[misc]
            decoder[other] = lambda r=reference: r.picture(noise)  # type: ignore[misc]
        timed = {
            "one guided evaluation": interleaved(evaluation, rounds),
            "decoder": interleaved(decoder, max(2, rounds // 2)),
            f"picture {schedule}": interleaved(picture, max(2, rounds // 4)),
        }
    rate = product_rate()
    share = 2 * macs(predictor) / rate / timed["one guided evaluation"][ENGINE].median
    return {
        "model": name,
        "threads": cpu().physical_cores,
        "cpu": cpu().model,
        "agreement": agreement,
        "product_gmacs": rate / 1e9,
        "share_of_product": share,
        "seconds": {what: {n: t.seconds for n, t in times.items()} for what, times in timed.items()},
        "faster_than": {what: _ratios(times) for what, times in timed.items()},
    }


def _ratios(times: dict[str, Times]) -> dict[str, float]:
    return {other: ratio(times, other, ENGINE) for other in times if other != ENGINE}


@click.command(cls=Command)
@click.argument("name", type=click.Choice(MODELS))
@click.option("--work", required=True, type=PATH, help="Folder for checkpoints and engines; used again.")
@click.option("--torch", "conditions", multiple=True, type=click.Choice(list(TORCH)), default=("eager fp32",))
@click.option("--schedule", default="H1P5R3", show_default=True)
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(2))
@click.option("--json", "as_json", is_flag=True)
def main(name: str, work: Path, conditions: tuple[str, ...], schedule: str, rounds: int, as_json: bool) -> None:
    """ONNX Runtime on the CPU against PyTorch on the same machine, weights and noise."""
    found = measure(name, work, list(conditions), schedule, rounds)
    if as_json:
        echo_json(found)
        return
    click.echo(f"{name} on {found['threads']} threads of {found['cpu']}")
    for what, others in found["faster_than"].items():
        for other, times in others.items():
            click.echo(f"{what}: {times:.2f} × as fast as PyTorch {other}")
    click.echo(
        f"an evaluation runs at {found['share_of_product']:.0%} of a {found['product_gmacs']:.0f} GMAC/s matrix product"
    )
    for other, error in found["agreement"].items():
        click.echo(f"latents against PyTorch {other}: {error:.1e} relative")


if __name__ == "__main__":
    main()
