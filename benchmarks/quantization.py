"""python -m benchmarks.quantization: what low precision is worth, measured on this machine, as docs/quantization.md.

On the demo model: clips by every method with and without equalised inputs, and a searched choice, on seeds that no
calibration looked at; sensitivity of every layer; speed, size, same-seed quality and FID of every form of build. On a
SiT of a released size with random weights: speed and size. What the trunks' files hold. And whether NVIDIA's parser and
builder, and OpenVINO itself, take each form.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.quantization_files import LATER, added, folder_of
from benchmarks.quantization_page import WIDE_SUMS, draw_ranges, write_page
from calibration.lowbit.fake_quantise import int8_layers
from calibration.lowbit.measure_ranges import Settings, calibrate
from calibration.lowbit.quality_meter import Judge, Target, shown
from calibration.lowbit.sensitivity import Found, choice_of, search_int8
from calibration.lowbit.trajectories import Deployment, load_deployment
from calibration.plot import plot_sensitivity
from calibration.samplers.probe import HELD_OUT, Guidance
from calibration.samplers.search_job import Wanted
from export.build import build
from export.build_request import BuildRequest, resolve_request
from export.lowbit.choice import write_choice
from export.lowbit.ranges import METHODS, Ranges, read_ranges
from export.proof.comparison import evaluation_ms
from export.targets import QUANTISED, graph_precision
from export.trace import load_model, trace
from flowturbo import demo
from flowturbo.evaluation.quality.features import Extractor
from flowturbo.evaluation.quality.metrics import Moments, frechet_distance
from flowturbo.evaluation.quality.populations import load_pack
from flowturbo.evaluation.quality.references import extractor_for
from flowturbo.evaluation.quality.sampled_latents import balanced_draw
from flowturbo.models.sit import SiT, named_config
from runtime.backends import Choice as BackendChoice
from runtime.backends.base import BackendOptions
from runtime.cli.command_base import PATH, Command
from runtime.directory.contract import profiles
from runtime.directory.manifest import SCHEMA, EngineRecord, FileRecord, Manifest, read_manifest
from runtime.pipeline import Pipeline
from runtime.system.errors import FlowTurboError
from runtime.system.files import make_folder, write_json
from runtime.system.hardware import cpu
from runtime.system.json_codec import to_json
from runtime.system.version import VERSION

Say = Callable[[str], None]
Numbers = dict[str, Any]
LARGER = "larger"
"""Further released sizes, by name, in a run of their own."""


def measure_demo(work: Path, images: int, search_images: int, target_db: float, samples: int, say: Say) -> Numbers:
    """The demo model: methods, sensitivity and the choice."""
    deployment = load_deployment(Wanted(None, None, None, None, Guidance()), {}, vaes=("ema",))
    path = work / "ranges.npz"
    ranges = read_ranges(path) if path.is_file() else calibrate(deployment, Settings(samples), path, say)
    target = Target(psnr_db=target_db)
    searching = Judge(deployment, search_images, 16, "ema", work / "search.json", ranges.sha256, say)
    found = search_int8(searching, ranges, target, METHODS, say)
    choice = choice_of(found, "int8", deployment, ranges, target, "python -m benchmarks.quantization")
    write_choice(work / "choice.json", choice)
    judge = Judge(deployment, images, 32, "ema", work / "held-out.json", ranges.sha256, say, first_seed=HELD_OUT)
    return {
        "images": images,
        "search_images": search_images,
        "target_db": target_db,
        "settings": dict(ranges.record.settings),
        "methods": _methods(judge, deployment, ranges, found, say),
        "wide": list(choice.wide),
        "chosen_method": f"{choice.method}, {'equalised' if choice.equalised else 'plain'}",
        "alone": {name: vars(quality) for name, quality in found.alone.items()},
        "blocks": {name: vars(quality) for name, quality in found.blocks.items()},
        "layers": len(ranges.layers),
        "layer_errors": {
            kind: {
                method: float(np.sqrt(np.median([getattr(one, f"{kind}_error")[i] for one in ranges.layers.values()])))
                for i, method in enumerate(METHODS)
            }
            for kind in ("plain", "equalised")
        },
    }


def _methods(judge: Judge, deployment: Deployment, ranges: Ranges, found: Found, say: Say) -> Numbers:
    """Each method, plain, equalised, and equalised with the searched layers wide; on held-out seeds."""
    rows: Numbers = {}
    for method in METHODS:
        for kind in ("plain", "equalised", "equalised, searched"):
            layers = int8_layers(deployment.by_role, ranges, method, equalised=kind != "plain")
            if kind.endswith("searched"):
                layers = {name: layer for name, layer in layers.items() if name not in found.wide}
            quality = judge.measure(f"{method} {kind} {sorted(layers)}", layers)
            rows[f"{method}, {kind}"] = vars(quality)
            say(f"  {method}, {kind}: {shown(quality)}")
    return rows


def measure_builds(work: Path, fid_images: int, say: Say) -> Numbers:
    """The demo built in every form for the CPU: what its gate measured, and its own FID."""
    asked: dict[str, dict[str, Any]] = {
        "int8": {"precision": "int8", "calibration": work / "ranges.npz"},
        "int8, searched": {"precision": "int8", "calibration": work / "ranges.npz", "choice": work / "choice.json"},
        "int8-weights": {"precision": "int8-weights"},
        "int4-weights": {"precision": "int4-weights"},
    }
    found: Numbers = {}
    with extractor_for(None, demo.REFERENCE, None, None, "cpu") as extractor:
        folder = work / "fp32"
        build(resolve_request(targets=["cpu"], max_batch=32, vaes=["ema"]), folder, say=say)
        found["fp32"] = {"fid": _fid(folder, extractor, fid_images)}
        for name, options in asked.items():
            folder = folder_of(work, name)
            request = resolve_request(targets=["cpu"], max_batch=32, vaes=["ema"], **options)
            manifest = build(request, folder, force=True, say=say).manifest
            found[name] = {"gate": to_json(manifest.gates[0]), "fid": _fid(folder, extractor, fid_images)}
            say(f"  {name}: FID {found[name]['fid']:.2f}, fp32 {found['fp32']['fid']:.2f}")
    return found | {"fid_images": fid_images}


def _fid(folder: Path, extractor: Extractor, images: int) -> float:
    reference = load_pack(demo.REFERENCE).population.moments
    assert reference is not None
    with Pipeline.load(folder) as pipeline:
        draw = balanced_draw(sorted(pipeline.manifest.model.classes), images, HELD_OUT)
        pictures = pipeline.generate(list(draw.labels), seeds=draw.seeds)
    return float(frechet_distance(Moments.of(extractor.extract(pictures).features), reference))


def random_checkpoint(name: str, path: Path) -> Path:
    """A SiT of a released size with random weights, none of them zero."""
    torch.manual_seed(0)
    model = SiT(named_config(name, learned_sigma=False))
    with torch.no_grad():
        for weight in model.parameters():
            if not bool(weight.any()):
                weight.normal_(std=0.02)
    torch.save(model.state_dict(), path)
    return path


def measure_large(name: str, work: Path, say: Say) -> Numbers:
    """One guided evaluation of a released size with random weights: every form against fp32 in one run, and sizes."""
    checkpoint = make_folder(work) / f"{name.replace('/', '-')}.pt"
    random_checkpoint(name, checkpoint)
    deployment = load_deployment(Wanted(checkpoint, None, None, None, Guidance()), {"solver": "euler", "steps": 2})
    calibrate(deployment, Settings(1, batch=1), work / "large.npz", say)
    folder, sides, sizes = work / "large", [], {}
    for precision in ("fp32", *QUANTISED):
        calibration = work / "large.npz" if precision == "int8" else None
        request = resolve_request(
            predictor=checkpoint, vaes=["none"], targets=["cpu"], precision=precision, calibration=calibration
        )
        manifest = _traced(request, folder, say)
        sides.append((folder, manifest, BackendChoice("onnxruntime", "cpu", BackendOptions(provider="cpu"), ""), ""))
        sizes[precision] = {
            "trunk": _size(manifest, ("predictor",)),
            "all": _size(manifest, ("predictor", "conditioning")),
        }
        if precision == "int8":
            # The same file as if its sums of pairs did not fit: what the rounding is worth.
            slow = replace(manifest, graphs=tuple(replace(graph, pairs_fit=False) for graph in manifest.graphs))
            sides.append((folder, slow, *sides[-1][2:]))
    took = evaluation_ms(sides, 256)
    forms = ("fp32", "int8", WIDE_SUMS, *QUANTISED[1:])
    return {"name": name, "ms": dict(zip(forms, took, strict=True)), "bytes": sizes | {WIDE_SUMS: sizes["int8"]}}


def _traced(request: BuildRequest, folder: Path, say: Say) -> Manifest:
    """The ONNX files of one precision, as a manifest that is good enough to time them."""
    (precision,) = request.precisions.values()
    model = load_model(request)
    graphs = list(trace(model, request, 256, graph_precision("cpu", precision), folder, set(), say))
    paths = [path for graph in graphs for path in (graph.path, graph.data) if path is not None]
    return Manifest(
        schema=SCHEMA, flowturbo=VERSION, inputs=request.inputs, key=request.key, created="",
        model=model.record(request), defaults=model.defaults(), vaes={}, resolutions=(256,), max_batch=1,
        static_batch=False, graphs=tuple(graphs),
        engines=tuple(
            EngineRecord(g.graph, 256, "cpu", g.computes or precision, g.path, executed=True) for g in graphs
        ),
        proofs=(), files=tuple(FileRecord(path, "", (folder / path).stat().st_size) for path in paths),
    )  # fmt: skip


def _size(manifest: Manifest, graphs: Sequence[str]) -> int:
    chosen = [path for g in manifest.graphs if g.graph in graphs for path in (g.path, g.data) if path is not None]
    return sum(manifest.file(path).bytes for path in chosen)


def measure_backends(work: Path, say: Say) -> Numbers:
    """Whether NVIDIA's parser and builder (those of TensorRT-RTX) take the demo's trunk in every form."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return {"skipped": "tensorrt-rtx is not installed"}
    from export.tensorrt.compiler import EngineJob, build_engine

    found: Numbers = {}
    manifest = read_manifest(work / "fp32")
    for precision in QUANTISED:
        calibration = work / "ranges.npz" if precision == "int8" else None
        asked = {precision: "tensorrt" if precision == "int8" else "rtx"}
        request = resolve_request(vaes=["none"], targets=["cpu"], precision=precision, calibration=calibration)
        files = graph_precision(asked[precision], precision)
        folder = work / "gpu"
        graphs = list(trace(load_model(request), request, 64, files, folder, set(), say))
        path = next(folder / graph.path for graph in graphs if graph.graph == "predictor")
        job = EngineJob(
            path, folder / f"{precision}.engine", "predictor", "rtx", precision, manifest.spec("predictor", 64),
            profiles(4, static=False),
        )  # fmt: skip
        try:
            built = build_engine(job)
            found[precision] = {"seconds": built.seconds, "bytes": built.bytes, "executed": built.executed}
        except FlowTurboError as error:
            found[precision] = {"error": error.given}
        found[precision]["onnx_bytes"] = path.stat().st_size
    return found


@click.command(cls=Command)
@click.option("--out", default=Path("docs/quantization.md"), show_default=True, type=PATH, help="The page.")
@click.option("--images", default=256, show_default=True, help="Held-out seeds of the demo.")
@click.option("--search-images", default=32, show_default=True, help="Seeds that the search looks at.")
@click.option("--target-psnr", default=48.0, show_default=True, help="dB that the search has to reach.")
@click.option("--samples", default=64, show_default=True, help="Images of the calibration.")
@click.option("--fid-images", default=512, show_default=True, help="Images of the demo's FID.")
@click.option("--large", default="SiT-B/2", show_default=True, help="Released size that is timed; none leaves it out.")
@click.option("--again", is_flag=True, help="Measure nothing: write the page again from the numbers beside it.")
@click.option(
    "--add",
    multiple=True,
    type=click.Choice([*LATER, LARGER]),
    help="Measure only this, and add it to the numbers of an earlier run beside the page: of what is in its --work, "
    f"or, {LARGER}, another --large.",
)
@click.option("--openvino-python", type=PATH, help="Python of an environment that has OpenVINO itself.")
@click.option("--work", type=PATH, help="Folder that keeps what was made, to go on with.  [default: a temporary one]")
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
    say: Say = lambda text: click.echo(text, err=True)  # noqa: E731 - one line
    if again or add:
        earlier: Numbers = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        if LARGER in add:
            with tempfile.TemporaryDirectory() as temporary:
                found = measure_large(large, (work or Path(temporary)) / LARGER, say)
            earlier[LARGER] = {**earlier.get(LARGER, {}), large: found}
        if later := [name for name in add if name != LARGER]:
            earlier |= added(later, work, openvino_python)
        if add:
            write_json(out.with_suffix(".json"), earlier)
        write_page(out, earlier)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(work or Path(temporary))
        numbers: Numbers = {
            "schema": 1,
            "flowturbo": VERSION,
            "cpu": asdict(cpu()),
            "versions": {name: module.__version__ for name, module in _modules().items()},
            "demo": measure_demo(folder, images, search_images, target_psnr, samples, say),
            "builds": measure_builds(folder, fid_images, say),
            "backends": measure_backends(folder, say),
            "large": None if large == "none" else measure_large(large, folder, say),
        }
        numbers |= added(LATER, folder, openvino_python)
        figures = make_folder(out.parent / "images")
        plot_sensitivity(figures / "quantization-sensitivity.png", _qualities(numbers["demo"]["alone"]), "int8, demo")
        draw_ranges(figures / "quantization-ranges.png", read_ranges(folder / "ranges.npz"))
    write_json(out.with_suffix(".json"), numbers)
    write_page(out, numbers)
    say(f"written: {out}")


def _modules() -> Mapping[str, Any]:
    import onnxruntime

    return {"torch": torch, "onnxruntime": onnxruntime, "numpy": np}


def _qualities(alone: Mapping[str, Any]) -> Mapping[str, Any]:
    from calibration.lowbit.quality_meter import Quality

    return {name: Quality(**quality) for name, quality in alone.items()}


if __name__ == "__main__":
    main()
