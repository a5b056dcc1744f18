"""Write the page and the plots of `benchmarks.quantization` from its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.plot import Sheet
from export.lowbit.ranges import CLIP_METHODS, TIME_BINS, Ranges
from runtime.system.files import write_atomically

Numbers = dict[str, Any]
"""Results as JSON data."""
WIDE_SUMS = "int8, sums in 32 bits"
"""Form of a measurement: the int8 file with the products that older builds need."""
MIN_INT8_SHARE = 0.8
METHOD_KINDS = ("plain", "equalised", "equalised, searched")


def write_quantization_page(path: Path, numbers: Numbers) -> None:
    """Write the page, whole or not at all."""
    sections = [
        _format_head,
        _format_summary,
        _format_methods,
        _format_sensitivity,
        _format_builds,
        _format_large_models,
        _format_weights,
        _format_backends,
        _format_instructions,
    ]
    text = "\n\n".join("\n".join(section(numbers)) for section in sections) + "\n"
    with write_atomically(path) as aside:
        aside.write_text(text, encoding="utf-8")


def plot_ranges(path: Path, ranges: Ranges) -> None:
    """Plot the largest input of each kind of layer over flow time: median and extremes over layers."""
    sheet = Sheet(1, width=6.4, height=3.8)
    (axes,) = sheet.axes
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        largest = np.stack(
            [layer.plain[:-1, CLIP_METHODS.index("minmax")] for n, layer in ranges.layers.items()
             if n.startswith("predictor/") and n.endswith(part)]
        )  # fmt: skip
        used_bins = np.flatnonzero(largest.any(axis=0))
        times = (used_bins + 0.5) / TIME_BINS
        axes.plot(times, np.median(largest[:, used_bins], axis=0), marker="o", markersize=4, label=part)
        axes.fill_between(times, largest[:, used_bins].min(axis=0), largest[:, used_bins].max(axis=0), alpha=0.15)
    axes.set(
        xlabel="flow time t", ylabel="largest |input| of a layer", yscale="log", title="predictor, over its blocks"
    )
    axes.legend(frameon=False, fontsize=8)
    sheet.save(path)


def _format_markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def _format_head(numbers: Numbers) -> list[str]:
    cpu, versions = numbers["cpu"], numbers["versions"]
    return [
        "# Low precision: what it is worth, and when",
        "",
        "Written by `python -m benchmarks.quantization`; do not edit. It measured every number. Speeds that are "
        "compared come from one run. Run it on your machine for yours.",
        "",
        f"- CPU: {cpu['model']}, {cpu['physical_cores']} cores. Of the features that decide about 8-bit products it "
        f"has {', '.join(cpu['features']) or 'none'}.",
        f"- ONNX Runtime {versions['onnxruntime']}, PyTorch {versions['torch']}.",
        "- No GPU was used. What this page says of GPUs is not measured.",
    ]


def _compute_gate_speedup(gate: Numbers) -> float:
    return float(gate["twin_ms"] / gate["evaluation_ms"])


def _format_summary(numbers: Numbers) -> list[str]:
    """Derive the verdicts from the numbers."""
    builds, large, fp32 = numbers["builds"], numbers["large"], numbers["builds"]["fp32"]["fid"]
    int8 = builds["int8"]["gate"]
    lines = [
        "## In short",
        "",
        f"- **int8** (weights and inputs of the trunk's linear layers), the demo: an evaluation takes "
        f"{1 / _compute_gate_speedup(int8):.2f} × fp32's time here. The trunks take "
        f"{int8['trunk_bytes'] / int8['twin_trunk_bytes']:.2f} × the bytes. The pictures are "
        f"{int8['psnr_db']:.1f} dB from fp32's, and the FID is {builds['int8']['fid'] / fp32:.3f} × fp32's.",
    ]
    for model in (*([] if large is None else [large]), *numbers.get("larger", {}).values()):
        speed, sizes = model["ms"]["fp32"] / model["ms"]["int8"], model["bytes"]
        lines.append(
            f"- {model['name']} (random weights): an int8 evaluation is {speed:.2f} × as fast as fp32's. The trunk has "
            f"{sizes['int8']['trunk'] / sizes['fp32']['trunk']:.2f} × the bytes, and "
            f"{sizes['int8']['all'] / sizes['fp32']['all']:.2f} × with its conditioning. The aim of 1.8 × is "
            f"{'met' if speed >= 1.8 else 'missed'} on this CPU."
        )
    weights = {"the demo": numbers["weights"]["demo"]["int8"]}
    if large is not None and "int8" in numbers["weights"]["large"]:
        weights[large["name"]] = numbers["weights"]["large"]["int8"]
    shares = {name: kinds["quantised"] / sum(kinds.values()) for name, kinds in weights.items()}
    shares_text = ", ".join(f"{100 * share:.1f} % ({name})" for name, share in shares.items())
    lines.append(
        f"- Of the trunks' weight bytes, {shares_text} are int8. The aim of {100 * MIN_INT8_SHARE:.0f} % is "
        f"{'met' if min(shares.values()) >= MIN_INT8_SHARE else 'missed'}."
    )
    vnni = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"} & set(numbers["cpu"]["features"])
    lines += [
        "- This CPU "
        + (
            f"has 8-bit products in hardware ({', '.join(sorted(vnni))})."
            if vnni
            else "has no 8-bit products in hardware (no VNNI). Its fastest ones add two products in 16 bits, where "
            "they can saturate. The weights are rounded so that this cannot happen (below), so the sums are exact."
        ),
        "- **int8-weights, int4-weights** save memory. They are for boards that the weights do not fit, not for speed. "
        "Their gate checks size and quality only.",
        "- On CPUs with AMX, try OpenVINO in bf16 first. The gate times it beside int8 where it can run, and says so "
        "when it is faster.",
    ]
    return lines


def _format_methods(numbers: Numbers) -> list[str]:
    demo = numbers["demo"]

    def rows() -> Iterator[Sequence[str]]:
        for method in CLIP_METHODS:
            qualities = [demo["methods"][f"{method}, {kind}"] for kind in METHOD_KINDS]
            errors = [f"{100 * demo['layer_errors'][kind][method]:.2f} %" for kind in METHOD_KINDS[:2]]
            yield [method, *(f"{q['psnr_db']:.1f} dB, {q['latent_rms']:.4f}" for q in qualities), " / ".join(errors)]

    naive, best = (demo["methods"][f"minmax, {kind}"] for kind in (METHOD_KINDS[0], METHOD_KINDS[2]))
    return [
        "## Clips, equalised inputs, and the search",
        "",
        f"The demo model over whole trajectories ({demo['settings']['sampler']}, guidance "
        f"{demo['settings']['guidance']:g}), {demo['images']} seeds. Neither calibration "
        f"({demo['settings']['samples']} images) nor search ({demo['search_images']} images) looked at these seeds. "
        "Cells have the median dB of the pictures and the median distance of the latents, against the exact model. "
        "Rounding is done in PyTorch as the engines do it; tests hold the two together.",
        "",
        *_format_markdown_table(
            [
                "clip",
                "naive W8A8",
                "equalised",
                "equalised + searched",
                "median error of a layer's output, plain / equalised",
            ],
            rows(),
        ),
        "",
        f"Naive W8A8 with the largest value as its clip has {naive['psnr_db']:.1f} dB. Equalised and searched it has "
        f"{best['psnr_db']:.1f} dB. That is {best['psnr_db'] - naive['psnr_db']:+.1f} dB, and "
        f"{best['latent_rms'] / naive['latent_rms']:.2f} × the distance.",
        "",
        "![largest inputs over flow time](images/quantization-ranges.png)",
    ]


def _format_sensitivity(numbers: Numbers) -> list[str]:
    demo = numbers["demo"]
    worst = sorted(demo["alone"].items(), key=lambda item: -item[1]["latent_rms"])[:8]
    return [
        "## Which layers hurt",
        "",
        f"One layer alone in int8 ({demo['chosen_method']}), {demo['search_images']} seeds, the whole trajectory "
        f"and picture:",
        "",
        "![sensitivity](images/quantization-sensitivity.png)",
        "",
        *_format_markdown_table(
            ["layer", "latents apart", "pictures"],
            ([f"`{name}`", f"{q['latent_rms']:.4f}", f"{q['psnr_db']:.1f} dB"] for name, q in worst),
        ),
        "",
        *_format_markdown_table(
            ["block", "latents apart", "pictures"],
            ([f"`{name}`", f"{q['latent_rms']:.4f}", f"{q['psnr_db']:.1f} dB"] for name, q in demo["blocks"].items()),
        ),
        "",
        f"For {demo['target_db']:g} dB, the search leaves {len(demo['wide'])} of {demo['layers']} layers in float32: "
        f"{', '.join(f'`{name}`' for name in demo['wide']) or 'none'}.",
    ]


def _format_builds(numbers: Numbers) -> list[str]:
    builds = numbers["builds"]

    def rows() -> Iterator[Sequence[str]]:
        yield ["fp32", "1", "1", "1", "", "", f"{builds['fp32']['fid']:.2f}", ""]
        for name, entry in builds.items():
            if name in ("fp32", "fid_images"):
                continue
            gate = entry["gate"]
            yield [
                name,
                f"{_compute_gate_speedup(gate):.2f} ×",
                f"{gate['bytes'] / gate['twin_bytes']:.2f} ×",
                f"{gate['trunk_bytes'] / gate['twin_trunk_bytes']:.2f} ×",
                f"{gate['psnr_db']:.1f} ({gate['psnr_p10_db']:.1f}) dB",
                f"{gate['latent_rms']:.4f}",
                f"{entry['fid']:.2f}",
                "passed" if not gate["failures"] else "; ".join(gate["failures"]),
            ]

    return [
        "## Builds of the demo, on ONNX Runtime's CPU provider",
        "",
        "As the gate of `build-engines` measured them:",
        "",
        "- speed of one guided evaluation, and files, against the fp32 build of the same run;",
        "- pictures of 64 seeds: median, and 10th percentile;",
        f"- the demo's own FID ({builds['fid_images']} images), which is comparable with nothing but itself.",
        "",
        "Both sides take turns, so that other work on the machine slows both. Ratios of evaluations this short vary "
        "from build to build all the same.",
        "",
        *_format_markdown_table(
            ["build", "speed", "all files", "trunks", "pictures", "latents apart", "FID", "gate"], rows()
        ),
    ]


def _format_large_models(numbers: Numbers) -> list[str]:
    models = [*([] if numbers["large"] is None else [numbers["large"]]), *numbers.get("larger", {}).values()]
    if not models:
        return ["## Larger models", "", "Not measured in this run."]
    lines: list[str] = []
    for model in models:
        sizes, fp32 = model["bytes"], model["bytes"]["fp32"]
        rows = [
            [
                precision,
                f"{model['ms']['fp32'] / ms:.2f} ×",
                f"{sizes[precision]['trunk'] / 1e6:.0f} MB, {sizes[precision]['trunk'] / fp32['trunk']:.2f} ×",
                f"{sizes[precision]['all'] / fp32['all']:.2f} ×",
            ]
            for precision, ms in model["ms"].items()
        ]
        lines += [
            *([""] if lines else []),
            f"## {model['name']} at 256 px",
            "",
            "Random weights: speed and size do not depend on them, quality would. One guided evaluation of one image. "
            "The forms took turns.",
            "",
            *_format_markdown_table(["form", "speed", "trunk", "trunk and conditioning"], rows),
        ]
    return lines


def _format_weights(numbers: Numbers) -> list[str]:
    """Show the constants of the trunks' files by kind."""
    constants, large = numbers["weights"], numbers["large"]

    def rows() -> Iterator[Sequence[str]]:
        models = {"demo": constants["demo"], **({large["name"]: constants["large"]} if large is not None else {})}
        for model, builds in models.items():
            for name, kinds in builds.items():
                total = sum(kinds.values())
                shares = (f"{100 * kinds[kind] / total:.1f} %" for kind in ("quantised", "scales", "wide", "rest"))
                yield [f"{model}, {name}", f"{total / 1e6:.1f} MB", *shares]

    searched = constants["demo"]["int8, searched"]
    int8_share = searched["quantised"] / (searched["quantised"] + searched["wide"] / 4)
    return [
        "## How much of a trunk is int8",
        "",
        "Bytes of the constants in the files of predictor and refiner, by what they are:",
        "",
        "- weights in int8 or int4;",
        "- their scales and those of their inputs, with zero points;",
        "- weights of layers that a choice leaves in float32;",
        "- the rest: patch embedding, final layer, biases, positions, shapes.",
        "",
        "The gate prints the same of every build, and the manifest has it.",
        "",
        *_format_markdown_table(["build", "constants", "int8 or int4", "scales", "in float32", "rest"], rows()),
        "",
        f"By number, not bytes, {100 * int8_share:.0f} % of the layers' weights are int8 in the searched build. "
        "A weight "
        "that stays in float32 takes four times the bytes, so a choice costs more size than layers.",
    ]


def _format_openvino(numbers: Numbers) -> tuple[str, list[str]]:
    """Return OpenVINO's row of the table, and its explanation."""
    report = numbers["openvino"]
    if "skipped" in report:
        return f"| OpenVINO itself | {report['skipped']} | | |", []
    files = {entry["file"]: entry for entry in report["files"]}

    def cell(form: str) -> str:
        entry = files[form]
        if "error" in entry:
            return f"refused: {entry['error']}"
        products = ", ".join(f"{count} in {kind}" for kind, count in entry["products"].items())
        return f"runs; products: {products}; {_format_percent(entry['off'])} from ONNX Runtime"

    cells = " | ".join(map(cell, ("int8", "int8-weights", "int4-weights")))
    row = f"| OpenVINO {report['openvino']} itself, {report['cpu']} | {cells} |"
    int8 = files["int8"]
    if "error" in int8:
        return row, []
    text = (
        f"OpenVINO itself was tried in an environment of its own (`benchmarks.openvino_core`, ONNX Runtime "
        f"{report['onnxruntime']}). The test is one guided evaluation of the demo's predictor at a random point. In "
        f"float32 the two are {_format_percent(files['fp32']['off'])} apart."
    )
    if int8["off"] < 0.01:
        text += " OpenVINO reads, compiles and runs the int8 file, with 8-bit products, and its sums are exact."
    text += (
        " So the plug-in's refusal is not OpenVINO's. It was seen on an Intel machine, with files that quantised their "
        "weights when they were loaded; ours hold integers. It could not be tried again, because the plug-in serves "
        "Intel CPUs only."
    )
    return row, ["", text]


def _format_percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 1e-3 else f"{share:.0e}"


def _format_backends(numbers: Numbers) -> list[str]:
    backends = numbers["backends"]
    lines = [
        "## What takes which form",
        "",
        "| | int8 (W8A8) | int8-weights | int4-weights |",
        "|---|---|---|---|",
        "| ONNX Runtime, CPU | run, above | run, above | run, above |",
    ]
    if "skipped" in backends:
        lines.append(f"| NVIDIA's parser and builder | {backends['skipped']} | | |")
    else:
        cells = []
        for precision in ("int8", "int8-weights", "int4-weights"):
            entry = backends[precision]
            cells.append(
                f"refused: {entry['error']}" if "error" in entry else f"parsed and built in {entry['seconds']:.1f} s"
            )
        lines.append(f"| NVIDIA's parser and builder (TensorRT-RTX's, without a GPU) | {' | '.join(cells)} |")
    openvino_row, openvino_text = _format_openvino(numbers)
    return [
        *lines,
        "| TensorRT, `--target tensorrt` | **not executed**: no GPU here; RTX's parser stands in | not executed "
        "| not executed |",
        "| TensorRT-RTX, `--target rtx` | not promised by NVIDIA: refused | not executed | not executed |",
        "| OpenVINO's plug-in, `--target openvino` | not supported: it refused quantised graphs when it was tried | no "
        "| no |",
        openvino_row,
        "| CUDA provider, `--target cuda` | **not executed**; it multiplies in floating point, so no gain is "
        "expected: the files are for `--from` on a Jetson | not executed | not executed |",
        *openvino_text,
    ]


def _format_instructions(numbers: Numbers) -> list[str]:
    return [
        "## How",
        "",
        "```",
        "flowturbo-calibrate int8 --samples 64 --out ranges.npz",
        "flowturbo-calibrate sensitivity --calibration ranges.npz --target-psnr 35 --out choice.json",
        "flowturbo-export build-engines --precision int8 --calibration ranges.npz --choice choice.json --out "
        "engines-int8",
        "flowturbo-export build-engines --precision int4-weights --out engines-int4",
        "```",
        "",
        "`int8` runs real trajectories in PyTorch, both branches of guidance. For each layer it records the smallest "
        "and largest value of every channel in ten bins of flow time, clips by four methods per bin and over all, and "
        "an equaliser. Statistics stream into histograms of fixed size. A killed run continues, and the same seeds "
        "give the same file. `--predictor`, `--refiner`, `--sampler` and `--guidance` name the deployment. A "
        "calibration of other checkpoints is refused.",
        "",
        "**What is quantised.** `attn.qkv`, `attn.proj`, `mlp.fc1` and `mlp.fc2` of every block: weights per output "
        "channel, inputs per tensor, both symmetric. Patch embedding, final layer, attention products and norms stay "
        "as they are. Conditioning and decoder have their weights in 16 bits.",
        "",
        "**Exact sums on every CPU.** x86 without VNNI adds the products of two neighbouring inputs in 16 bits. There "
        "they saturate unless the two weights add up to 128 at most. So each output channel takes the step that loses "
        "least once its few larger sums have been cut (`export/lowbit/rounding.py`). Then the fastest products are "
        f"exact everywhere. Rows called *{WIDE_SUMS}* run the same file with ONNX Runtime's "
        "`session.x64quantprecision`: slower products that are exact with any weights. CPUs with VNNI have no such "
        "difference.",
        "",
        "**Equalised inputs** (SmoothQuant, arXiv 2211.10438). Each channel of a layer's input is divided by a "
        "constant and the weight's column multiplied by it, which changes nothing. The division goes into the "
        "modulations (`attn.qkv`, `mlp.fc1`), into the value rows (`attn.proj`), or stays as one product "
        "(`mlp.fc2`). Strength, and whether at all, are decided per layer by the error of its output on activations "
        "recorded from the trajectories.",
        "",
        "**The search** orders layers by the squared error that each brings alone per weight. It finds the shortest "
        "beginning of that order that must stay in float32 for the target. Then it lets layers go back one by one. "
        "`--precision fp16` searches layers, softmaxes and decoders that need float32 in the same way.",
        "",
        "**The gate** of a quantised build exports a reference build in higher precision, times both in turn, and "
        "makes 64 pictures or more from the same seeds with both. It refuses a build that is not faster (int8), not "
        "smaller, or below `--gate-psnr`. `--force` builds it all the same, and the manifest records what was "
        "measured. A refused build leaves an earlier directory as it was. What was made waits in a hidden folder "
        "beside `--out`, which the message names: also the reference build and the latents of the pictures. The same "
        "command with `--force` begins there. Whatever is built next in that place continues with it or throws it "
        "away. On a device without checkpoints, `build-engines --from DIR --against WIDER` compares with a directory "
        "of engines in higher precision.",
    ]
