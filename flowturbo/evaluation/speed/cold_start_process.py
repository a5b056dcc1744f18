"""The fresh process of a cold start: do one job and print one line of JSON. Run as `python -m`, see `cold_start`.

Its imports are part of what it measures, so the top imports the standard library only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COMPILE_NOTES = {
    "fake": "nothing is compiled",
    "onnxruntime CPUExecutionProvider": "ONNX Runtime optimises the graphs while it opens them: part of load_ms",
    "onnxruntime OpenVINOExecutionProvider": "OpenVINO compiles while it opens graphs: part of load_ms; caches cut it",
    "onnxruntime CUDAExecutionProvider": "kernels are chosen in the first run: part of first_image_ms",
    "rtx": "the JIT compiles when a graph first runs: part of first_image_ms, which the runtime cache cuts",
    "tensorrt": "engines are compiled at build time; CUDA graphs are captured in the first run",
}
"""Where each backend compiles."""


def main(arguments: Sequence[str]) -> None:
    """Do the job and print one line of JSON."""
    begin_ns = time.monotonic_ns()
    job: Any = json.loads(arguments[0])

    from flowturbo.evaluation.speed.cold_start import ColdStart
    from flowturbo.evaluation.speed.conditions import build_engine_subject
    from flowturbo.evaluation.speed.memory import read_process_memory
    from flowturbo.evaluation.speed.timed_pipeline import TimedPipeline
    from runtime.sampling.sde import Diffusion
    from runtime.system.json_codec import to_json

    imported_ns = time.monotonic_ns()
    pipeline = TimedPipeline.open(Path(job["folder"]), **job["load"])
    with pipeline:
        loaded_ns, loaded_memory = time.monotonic_ns(), read_process_memory()
        classes, options, decode = (job["request"][key] for key in ("classes", "options", "decode"))
        if options.get("diffusion") is not None:
            options["diffusion"] = Diffusion(**options["diffusion"])
        subject = build_engine_subject(
            job["engine"], pipeline, classes, 1, options, conditioning="fresh", decode=decode
        )
        first_begin_ns = time.monotonic_ns()
        subject.sample()
        first_end_ns = time.monotonic_ns()
        subject.sample()
        second_end_ns, ran_memory = time.monotonic_ns(), read_process_memory()
        ran = pipeline.ran
        late_ms = sum(pipeline.load_ms[name] for name in pipeline.late_graphs)
        cold_start = ColdStart(
            engine=job["engine"],
            resolution=pipeline.resolution,
            sampler=subject.condition.sampler,
            caches=job["caches"],
            process_ms=_compute_elapsed_ms(job["spawned_ns"], begin_ns),
            import_ms=_compute_elapsed_ms(begin_ns, imported_ns),
            load_ms=round(_compute_elapsed_ms(imported_ns, loaded_ns) + late_ms, 3),
            engines_ms={name: round(ms, 3) for name, ms in pipeline.load_ms.items()},
            compile_ms=None,
            compile_note=_COMPILE_NOTES.get(ran.backend)
            or _COMPILE_NOTES.get(f"{ran.backend} {ran.provider}", "not told apart"),
            first_image_ms=round(_compute_elapsed_ms(first_begin_ns, first_end_ns) - late_ms, 3),
            second_image_ms=_compute_elapsed_ms(first_end_ns, second_end_ns),
            total_ms=_compute_elapsed_ms(job["spawned_ns"], first_end_ns),
            loaded=loaded_memory,
            ran=ran_memory,
            weight_bytes=pipeline.weight_bytes(),
        )
    print(json.dumps(to_json(cold_start)))


def _compute_elapsed_ms(start_ns: int, end_ns: int) -> float:
    return round((end_ns - start_ns) / 1e6, 3)


if __name__ == "__main__":
    main(sys.argv[1:])
