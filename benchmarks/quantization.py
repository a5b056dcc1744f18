"""python -m benchmarks.quantization: measure low precision on this machine, and write docs/quantization.md.

On the demo model: clips by every method with and without equalised inputs, and a searched choice, on seeds that no
calibration used; sensitivity of every layer; speed, size, same-seed quality and FID of every form of build. On a SiT of
a released size with random weights: speed and size. Also the contents of the trunks' files, and whether NVIDIA's parser
and builder, and OpenVINO itself, accept each form.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np
import onnxruntime
import torch

from benchmarks.models import make_random_network
from benchmarks.quantization_files import FILE_MEASUREMENTS, get_build_folder, measure_selected
from benchmarks.quantization_page import WIDE_SUMS, Numbers, plot_ranges, write_quantization_page
from calibration.guidance_choice import Guidance
from calibration.lowbit.fake_quantise import make_int8_layers
from calibration.lowbit.measure_ranges import CalibrationSettings, calibrate_int8
from calibration.lowbit.quality_meter import QualityMeter, QualityTarget, format_quality
from calibration.lowbit.sensitivity import SensitivityResult, make_choice, search_int8
from calibration.lowbit.trajectories import Deployment, load_deployment
from calibration.model import ModelSpec
from calibration.plot import plot_sensitivity
from calibration.samplers.probe import HELD_OUT_SEED
from export.build import build
from export.build_request import BuildRequest, resolve_request
from export.lowbit.choice import write_choice
from export.lowbit.ranges import CLIP_METHODS, Ranges, read_ranges
from export.model import load_model
from export.proof.gate import measure_evaluation_ms
from export.stage import BuildStage
from export.targets import QUANTISED_PRECISIONS, resolve_graph_precision
from export.trace import trace_graphs
from flowturbo import demo
from flowturbo.checkpoints import save_network
from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.metrics import Moments, frechet_distance
from flowturbo.evaluation.quality.populations import load_pack
from flowturbo.evaluation.quality.references import ExtractorOptions
from flowturbo.evaluation.quality.sampled_latents import make_balanced_draw
from runtime.backends import BackendChoice
from runtime.backends.base import BackendOptions
from runtime.cli.command_base import PATH, Command
from runtime.cli.progress_display import LineProgress
from runtime.directory.contract import build_profiles
from runtime.directory.manifest import MANIFEST_SCHEMA, read_manifest
from runtime.directory.records import EngineRecord, FileRecord, Manifest
from runtime.pipeline import Pipeline
from runtime.sampling.sampler import SamplerChoice
from runtime.system.errors import FlowTurboError
from runtime.system.files import make_folder, write_json
from runtime.system.hardware import detect_cpu
from runtime.system.json_codec import to_json
from runtime.system.progress import Progress
from runtime.system.version import VERSION

LARGER = "larger"
"""Further released sizes, by name, in a separate run."""


def measure_demo(
    work: Path, images: int, search_images: int, target_db: float, samples: int, progress: Progress
) -> Numbers:
    """Measure the demo model: methods, sensitivity and the choice."""
    deployment = load_deployment(ModelSpec(None, None, None, None, Guidance()), vaes=("ema",))
    path = work / "ranges.npz"
    ranges = (
        read_ranges(path)
        if path.is_file()
        else calibrate_int8(deployment, CalibrationSettings(samples), path, progress)
    )
    target = QualityTarget(psnr_db=target_db)
    search_judge = QualityMeter(deployment, search_images, 16, "ema", work / "search.npz", ranges.sha256, progress)
    search_result = search_int8(search_judge, ranges, target, CLIP_METHODS, progress)
    choice = make_choice(search_result, "int8", deployment, ranges, target, "python -m benchmarks.quantization")
    write_choice(work / "choice.json", choice)
    judge = QualityMeter(
        deployment, images, 32, "ema", work / "held-out.npz", ranges.sha256, progress, first_seed=HELD_OUT_SEED
    )
    return {
        "images": images,
        "search_images": search_images,
        "target_db": target_db,
        "settings": dict(ranges.record.settings),
        "methods": _measure_methods(judge, deployment, ranges, search_result, progress),
        "wide": list(choice.wide),
        "chosen_method": f"{choice.method}, {'equalised' if choice.equalised else 'plain'}",
        "alone": {name: vars(quality) for name, quality in search_result.alone.items()},
        "blocks": {name: vars(quality) for name, quality in search_result.blocks.items()},
        "layers": len(ranges.layers),
        "layer_errors": {
            kind: {
                method: float(
                    np.sqrt(np.median([getattr(layer, f"{kind}_error")[i] for layer in ranges.layers.values()]))
                )
                for i, method in enumerate(CLIP_METHODS)
            }
            for kind in ("plain", "equalised")
        },
    }


def _measure_methods(
    judge: QualityMeter, deployment: Deployment, ranges: Ranges, search_result: SensitivityResult, progress: Progress
) -> Numbers:
    """Measure each method, plain, equalised, and equalised with the searched layers wide; on held-out seeds."""
    qualities: Numbers = {}
    for method in CLIP_METHODS:
        for kind in ("plain", "equalised", "equalised, searched"):
            layers = make_int8_layers(deployment.networks.by_role, ranges, method, equalised=kind != "plain")
            if kind.endswith("searched"):
                layers = {name: layer for name, layer in layers.items() if name not in search_result.wide}
            quality = judge.measure(f"{method} {kind} {sorted(layers)}", layers)
            qualities[f"{method}, {kind}"] = vars(quality)
            progress.write(f"  {method}, {kind}: {format_quality(quality)}")
    return qualities


def measure_builds(work: Path, fid_images: int, progress: Progress) -> Numbers:
    """Build the demo in every form for the CPU; return the measurements of its gate, and its FID."""
    build_options: Numbers = {
        "int8": {"precision": "int8", "calibration": work / "ranges.npz"},
        "int8, searched": {"precision": "int8", "calibration": work / "ranges.npz", "choice": work / "choice.json"},
        "int8-weights": {"precision": "int8-weights"},
        "int4-weights": {"precision": "int4-weights"},
    }
    results: Numbers = {}
    with ExtractorOptions().open(demo.REFERENCE) as extractor:
        folder = work / "fp32"
        build(resolve_request(targets=["cpu"], max_batch=32, vaes=["ema"]), folder, progress=progress)
        results["fp32"] = {"fid": _measure_fid(folder, extractor, fid_images)}
        for name, options in build_options.items():
            folder = get_build_folder(work, name)
            request = resolve_request(targets=["cpu"], max_batch=32, vaes=["ema"], **options)
            manifest = build(request, folder, force=True, progress=progress).manifest
            results[name] = {"gate": to_json(manifest.gates[0]), "fid": _measure_fid(folder, extractor, fid_images)}
            progress.write(f"  {name}: FID {results[name]['fid']:.2f}, fp32 {results['fp32']['fid']:.2f}")
    return results | {"fid_images": fid_images}


def _measure_fid(folder: Path, extractor: Extractor, images: int) -> float:
    reference = load_pack(demo.REFERENCE).population.moments
    assert reference is not None
    with Pipeline.load(folder) as pipeline:
        draw = make_balanced_draw(sorted(pipeline.manifest.model.classes), images, HELD_OUT_SEED)
        pictures = pipeline.generate(list(draw.labels), seeds=draw.seeds)
    return float(frechet_distance(Moments.from_features(extractor.extract(pictures).features), reference))


def measure_large(name: str, work: Path, progress: Progress) -> Numbers:
    """Measure an evaluation of a released size with random weights: every form and fp32 in one run, and sizes."""
    checkpoint = make_folder(work) / f"{name.replace('/', '-')}.safetensors"
    save_network(checkpoint, make_random_network(name), role="predictor")
    deployment = load_deployment(
        ModelSpec(checkpoint, None, None, None, Guidance()), SamplerChoice(solver="euler", steps=2)
    )
    calibrate_int8(deployment, CalibrationSettings(1, batch=1), work / "large.npz", progress)
    folder, sides, sizes = work / "large", [], {}
    for precision in ("fp32", *QUANTISED_PRECISIONS):
        calibration = work / "large.npz" if precision == "int8" else None
        request = resolve_request(
            predictor=checkpoint, vaes=["none"], targets=["cpu"], precision=precision, calibration=calibration
        )
        manifest = _trace_manifest(request, folder, progress)
        sides.append((folder, manifest, BackendChoice("onnxruntime", "cpu", BackendOptions(provider="cpu"), ""), ""))
        sizes[precision] = {
            "trunk": _sum_graph_bytes(manifest, ("predictor",)),
            "all": _sum_graph_bytes(manifest, ("predictor", "conditioning")),
        }
        if precision == "int8":
            # The same file as if its sums of pairs did not fit: what the rounding is worth.
            wide_sums_manifest = replace(
                manifest, graphs=tuple(replace(graph, pairs_fit=False) for graph in manifest.graphs)
            )
            sides.append((folder, wide_sums_manifest, *sides[-1][2:]))
    times_ms = measure_evaluation_ms(sides, 256)
    forms = ("fp32", "int8", WIDE_SUMS, *QUANTISED_PRECISIONS[1:])
    return {"name": name, "ms": dict(zip(forms, times_ms, strict=True)), "bytes": sizes | {WIDE_SUMS: sizes["int8"]}}


def _trace_manifest(request: BuildRequest, folder: Path, progress: Progress) -> Manifest:
    """Trace the ONNX files of one precision, as a manifest that is good enough to time them."""
    (precision,) = request.precisions.values()
    model = load_model(request)
    stage = BuildStage(folder, request.key)
    trace_graphs(model, request, 256, resolve_graph_precision("cpu", precision), stage, progress)
    graphs = stage.graphs
    paths = [path for graph in graphs for path in (graph.path, graph.data) if path is not None]
    return Manifest(
        schema=MANIFEST_SCHEMA, flowturbo=VERSION, inputs=request.inputs, key=request.key, created="",
        model=model.make_record(request), defaults=model.make_defaults(), vaes={}, resolutions=(256,), max_batch=1,
        static_batch=False, graphs=tuple(graphs),
        engines=tuple(
            EngineRecord(g.graph, 256, "cpu", g.computes or precision, g.path, executed=True) for g in graphs
        ),
        proofs=(), files=tuple(FileRecord(path, "", (folder / path).stat().st_size) for path in paths),
    )  # fmt: skip


def _sum_graph_bytes(manifest: Manifest, graphs: Sequence[str]) -> int:
    paths = [path for g in manifest.graphs if g.graph in graphs for path in (g.path, g.data) if path is not None]
    return sum(manifest.find_file(path).bytes for path in paths)


def measure_backends(work: Path, progress: Progress) -> Numbers:
    """Check whether NVIDIA's parser and builder (of TensorRT-RTX) accept the demo's trunk in every form."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return {"skipped": "tensorrt-rtx is not installed"}
    from export.tensorrt.compiler import EngineJob, build_engine

    results: Numbers = {}
    manifest = read_manifest(work / "fp32")
    for precision in QUANTISED_PRECISIONS:
        calibration = work / "ranges.npz" if precision == "int8" else None
        targets = {precision: "tensorrt" if precision == "int8" else "rtx"}
        request = resolve_request(vaes=["none"], targets=["cpu"], precision=precision, calibration=calibration)
        graph_form = resolve_graph_precision(targets[precision], precision)
        folder = work / "gpu" / precision
        stage = BuildStage(folder, request.key)
        trace_graphs(load_model(request), request, 64, graph_form, stage, progress)
        path = next(folder / graph.path for graph in stage.graphs if graph.graph == "predictor")
        job = EngineJob(
            path, folder / f"{precision}.engine", "predictor", "rtx", precision, manifest.build_spec("predictor", 64),
            build_profiles(4, static=False),
        )  # fmt: skip
        try:
            engine = build_engine(job)
            results[precision] = {"seconds": engine.seconds, "bytes": engine.bytes, "executed": engine.executed}
        except FlowTurboError as error:
            results[precision] = {"error": error.given}
        results[precision]["onnx_bytes"] = path.stat().st_size
    return results


@click.command(cls=Command)
@click.option("--out", default=Path("docs/quantization.md"), show_default=True, type=PATH, help="The page.")
@click.option("--images", default=256, show_default=True, help="Held-out seeds of the demo.")
@click.option("--search-images", default=32, show_default=True, help="Seeds of the search.")
@click.option("--target-psnr", default=48.0, show_default=True, help="dB that the search has to reach.")
@click.option("--samples", default=64, show_default=True, help="Images of the calibration.")
@click.option("--fid-images", default=512, show_default=True, help="Images of the demo's FID.")
@click.option("--large", default="SiT-B/2", show_default=True, help="Released size that is timed; none leaves it out.")
@click.option("--again", is_flag=True, help="Measure nothing: write the page again from the numbers beside it.")
@click.option(
    "--add",
    multiple=True,
    type=click.Choice([*FILE_MEASUREMENTS, LARGER]),
    help="Measure only this, and add it to the numbers of an earlier run beside the page: of what is in its --work, "
    f"or, {LARGER}, another --large.",
)
@click.option("--openvino-python", type=PATH, help="Python of an environment that has OpenVINO itself.")
@click.option("--work", type=PATH, help="Folder of intermediate files, to continue with.  [default: a temporary one]")
def main(
    out: Path,
    images: int,
    search_images: int,
    target_psnr: float,
    samples: int,
    fid_images: int,
    large: str,
    again: bool,
    add: tuple[str, ...],
    openvino_python: Path | None,
    work: Path | None,
) -> None:
    """Measure low precision on this machine and write the page."""
    progress: Progress = LineProgress()
    if again or add:
        earlier: Numbers = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        if LARGER in add:
            with tempfile.TemporaryDirectory() as temporary:
                larger_numbers = measure_large(large, (work or Path(temporary)) / LARGER, progress)
            earlier[LARGER] = {**earlier.get(LARGER, {}), large: larger_numbers}
        if file_measurements := [name for name in add if name != LARGER]:
            earlier |= measure_selected(file_measurements, work, openvino_python)
        if add:
            write_json(out.with_suffix(".json"), earlier)
        write_quantization_page(out, earlier)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(work or Path(temporary))
        numbers: Numbers = {
            "schema": 1,
            "flowturbo": VERSION,
            "cpu": asdict(detect_cpu()),
            "versions": {module.__name__: module.__version__ for module in (torch, onnxruntime, np)},
            "demo": measure_demo(folder, images, search_images, target_psnr, samples, progress),
            "builds": measure_builds(folder, fid_images, progress),
            "backends": measure_backends(folder, progress),
            "large": None if large == "none" else measure_large(large, folder, progress),
        }
        numbers |= measure_selected(FILE_MEASUREMENTS, folder, openvino_python)
        figures = make_folder(out.parent / "images")
        distances = {name: quality["latent_rms"] for name, quality in numbers["demo"]["alone"].items()}
        plot_sensitivity(figures / "quantization-sensitivity.png", distances, "int8, demo")
        plot_ranges(figures / "quantization-ranges.png", read_ranges(folder / "ranges.npz"))
    write_json(out.with_suffix(".json"), numbers)
    write_quantization_page(out, numbers)
    progress.write(f"written: {out}")


if __name__ == "__main__":
    main()
