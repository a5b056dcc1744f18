"""python -m benchmarks.speed SiT-B/2 --work FOLDER: ONNX Runtime on the CPU and PyTorch, in turns, in one process.

One guided evaluation (an Euler step) and a whole picture (a schedule and the decoder), from the same weights, noise and
labels; both must end in the same latents. A network's share of the machine is its rate of multiplications over that of
a measured matrix product. Weights are random, of the released sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.models import build_random_engines, write_random_checkpoints
from flowturbo.checkpoints import load_network
from flowturbo.evaluation.speed.macs import estimate_sit_cost
from flowturbo.evaluation.speed.roofline import measure_best_limits
from flowturbo.evaluation.speed.rounds import time_calls
from flowturbo.evaluation.speed.statistics import compute_speedup
from flowturbo.models.sit import MODEL_NAMES, SiT
from flowturbo.models.vae import Vae, load_vae
from flowturbo.torch_sampler import sample
from runtime.cli.command_base import PATH, Command, echo_json
from runtime.execution.fixed_loop import Usage
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.sampling.noise import sample_noise
from runtime.system.errors import ProofError
from runtime.system.hardware import detect_cpu

Floats = NDArray[np.float32]
TORCH_CONDITIONS = {
    "eager fp32": (False, torch.float32),
    "compiled fp32": (True, torch.float32),
    "eager bf16": (False, torch.bfloat16),
    "compiled bf16": (True, torch.bfloat16),
}
ENGINE = "onnxruntime fp32"
LATENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Of the latents at the end: the root mean square of the difference over that of the values."""


class TorchReference:
    """The same sampler in PyTorch: a predictor, a refiner and a VAE, in one condition of `TORCH_CONDITIONS`."""

    def __init__(self, predictor: SiT, refiner: SiT, vae: Vae, compiled: bool, dtype: torch.dtype) -> None:
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda module: module
        self._networks = {"predictor": wrap(predictor), "refiner": wrap(refiner)}
        self._decode, self._dtype = wrap(vae.decode), dtype

    def sample_latents(self, request: Request, noise: Floats) -> Floats:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            latents: Floats = sample(
                self._networks,
                request.sampler.plan,
                request.conditions,
                torch.from_numpy(noise),
                guided_channels=request.guidance_channels,
            ).numpy()
        return latents

    def decode_picture(self, latents: Floats) -> Floats:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            pixels: Floats = self._decode(torch.from_numpy(latents)).float().numpy()
        return pixels


def check_same_latents(name: str, latents: Floats, expected: Floats, tolerance: float) -> float:
    """Return the relative error of latents.

    Raises:
        ProofError: they belong to different pictures.
    """
    error = float(np.sqrt(np.mean((latents - expected) ** 2) / np.mean(expected**2)))
    if not error <= tolerance:
        raise ProofError(f"the latents of {name} are off by {error:.1e}", allowed=f"{tolerance:g}")
    return error


def measure_model(name: str, work: Path, conditions: list[str], schedule: str, rounds: int) -> dict[str, Any]:
    """Measure times and agreement of one model size."""
    files, folder = write_random_checkpoints(work, name), build_random_engines(work, name)
    predictor, refiner = (
        load_network(path, role).model  # type: ignore[arg-type]
        for path, role in ((files.predictor, "predictor"), (files.refiner, "refiner"))
    )
    vae = load_vae(str(files.vae))
    torch.set_num_threads(detect_cpu().physical_cores)
    references = {name: TorchReference(predictor, refiner, vae, *TORCH_CONDITIONS[name]) for name in conditions}
    with Pipeline.load(folder, provider="cpu") as pipeline:
        noise = sample_noise([0], (4, 32, 32))
        step_request, picture_request = (
            pipeline.request(207, **options) for options in ({"solver": "euler", "steps": 1}, {"schedule": schedule})
        )
        step_request = replace(step_request, vae=None)

        def engine(request: Request) -> Floats:
            return pipeline.run(request, noise=noise).latents

        agreement = {
            other: check_same_latents(
                other,
                engine(picture_request),
                reference.sample_latents(picture_request, noise),
                LATENT_TOLERANCE[TORCH_CONDITIONS[other][1]],
            )
            for other, reference in references.items()
        }
        evaluation: dict[str, Callable[[], object]] = {ENGINE: lambda: engine(step_request)}
        picture: dict[str, Callable[[], object]] = {ENGINE: lambda: engine(picture_request)}
        decoder: dict[str, Callable[[], object]] = {
            ENGINE: lambda: pipeline.decoders.decode(noise, str(picture_request.vae), Usage())
        }
        for other, reference in references.items():
            evaluation[other] = lambda r=reference: r.sample_latents(step_request, noise)  # type: ignore[misc]
            picture[other] = lambda r=reference: r.decode_picture(r.sample_latents(picture_request, noise))  # type: ignore[misc]
            decoder[other] = lambda r=reference: r.decode_picture(noise)  # type: ignore[misc]
        times_by_task = {
            "one guided evaluation": time_calls(evaluation, rounds),
            "decoder": time_calls(decoder, max(2, rounds // 2)),
            f"picture {schedule}": time_calls(picture, max(2, rounds // 4)),
        }
        cost = estimate_sit_cost(pipeline.manifest.model.predictor, pipeline.manifest.compute_side(pipeline.resolution))
    rate = measure_best_limits().flops_per_s["fp32"] / 2
    share = 2 * cost.trunk_macs / rate / (median(times_by_task["one guided evaluation"][ENGINE]) / 1e3)
    return {
        "model": name,
        "threads": detect_cpu().physical_cores,
        "cpu": detect_cpu().model,
        "agreement": agreement,
        "product_gmacs": rate / 1e9,
        "share_of_product": share,
        "seconds": {
            task: {name: [ms / 1e3 for ms in times_ms] for name, times_ms in times.items()}
            for task, times in times_by_task.items()
        },
        "faster_than": {
            task: {name: compute_speedup(times_ms, times[ENGINE]) for name, times_ms in times.items() if name != ENGINE}
            for task, times in times_by_task.items()
        },
    }


@click.command(cls=Command)
@click.argument("name", type=click.Choice(MODEL_NAMES))
@click.option("--work", required=True, type=PATH, help="Folder for checkpoints and engines; used again.")
@click.option(
    "--torch", "conditions", multiple=True, type=click.Choice(list(TORCH_CONDITIONS)), default=("eager fp32",)
)
@click.option("--schedule", default="H1P5R3", show_default=True)
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(2))
@click.option("--json", "as_json", is_flag=True)
def main(name: str, work: Path, conditions: tuple[str, ...], schedule: str, rounds: int, as_json: bool) -> None:
    """Compare ONNX Runtime on the CPU with PyTorch on the same machine, weights and noise."""
    results = measure_model(name, work, list(conditions), schedule, rounds)
    if as_json:
        echo_json(results)
        return
    click.echo(f"{name} on {results['threads']} threads of {results['cpu']}")
    for task, speedups in results["faster_than"].items():
        for other, speedup in speedups.items():
            click.echo(f"{task}: {speedup:.2f} × as fast as PyTorch {other}")
    click.echo(
        f"an evaluation runs at {results['share_of_product']:.0%} of a {results['product_gmacs']:.0f} GMAC/s "
        "matrix product"
    )
    for other, error in results["agreement"].items():
        click.echo(f"latents against PyTorch {other}: {error:.1e} relative")


if __name__ == "__main__":
    main()
