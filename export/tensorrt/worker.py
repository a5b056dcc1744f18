"""The process that builds one engine: `python -m export.tensorrt.worker JOB.json RESULT.json`, run by `build_engine`.

Writes progress as JSON lines to its standard output, logs to standard error, and leaves RESULT.json: what was built,
or the error. It ends when its standard input closes, which happens when the parent dies by whatever cause.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from export.tensorrt.compiler import EngineJob, resident_bytes
from export.tensorrt.engine_layers import check_types, layer_report
from runtime.backends.base import BackendOptions, EngineFile
from runtime.backends.native.trt_api import Api, BuiltWith, load_api, runs_on
from runtime.directory.contract import Profile, Specs
from runtime.system.cuda_driver import Gpu
from runtime.system.errors import BackendError, FlowTurboError, ProofError
from runtime.system.files import sha256_of
from runtime.system.hardware import gpus, is_tegra, jetson, memory_bytes

RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0+")
"""What TensorRT-RTX builds for unless told otherwise. No Hopper; 7.5 only when it is named."""
_SMALLEST_WORKSPACE = 64 << 20
_REPORT_EVERY_S = 0.2


def main() -> None:
    """Builds the engine of a job file and leaves a result file."""
    job_file, result_file = Path(sys.argv[1]), Path(sys.argv[2])
    job = EngineJob.from_json(json.loads(job_file.read_text(encoding="utf-8")))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent decides and kills
    channel = _own_channel()
    threading.Thread(target=_end_with_parent, args=(job.out,), daemon=True).start()
    try:
        result = _build(job, channel)
    except FlowTurboError as error:
        said = {"kind": type(error).__name__, "given": error.given, "allowed": error.allowed, "remedy": error.remedy}
        result = {"error": said}
    except OSError as error:
        given = f"cannot write {job.out.name}: {error.strerror or error}"
        result = {"error": {"kind": "OutputError", "given": given, "allowed": "", "remedy": "free space"}}
    result_file.write_text(json.dumps(result), encoding="utf-8")
    sys.stderr.flush()
    os._exit(1 if "error" in result else 0)  # what TensorRT does while it unloads cannot spoil a finished build


def _own_channel() -> IO[str]:
    """Standard output for progress alone: whatever a library prints goes to the log."""
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _end_with_parent(out: Path) -> None:
    while os.read(0, 1024):
        pass
    with suppress(OSError):
        out.unlink(missing_ok=True)
    os._exit(3)


def _build(job: EngineJob, channel: IO[str]) -> dict[str, Any]:
    api = load_api(job.flavour)
    found, _ = gpus()
    gpu = found[0] if found else None
    network = _parse(api, job)
    check_tensors(network[1], job)
    check_types(network[1], job.precision, job.graph)
    layers = layer_report(network[1])
    _compile(api, job, network, channel)
    del network
    built = _built_with(api, gpu)
    executed, engine_layers, notes = _try_out(api, job, built, gpu)
    return {
        "built": built.to_json(),
        "hardware": "portable" if api.traits.portable else "this GPU",
        "layers": layers,
        "engine_layers": engine_layers,
        "executed": executed,
        "notes": notes,
        "peak_rss_bytes": resident_bytes("self")[1],
    }


def _parse(api: Api, job: EngineJob) -> Any:
    """Builder, network and parser of an ONNX file, strongly typed always."""
    from polygraphy.backend.trt import network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    unreadable = BackendError(
        f"{api.name} cannot read {job.onnx.name}",
        remedy="the file is damaged or holds an operation it lacks; export it again (--rebuild)",
    )
    try:
        parsed = network_from_onnx_path(str(job.onnx), strongly_typed=api.traits.typed_by_flag)
    except PolygraphyException as error:
        raise unreadable from error
    if parsed[1].num_layers == 0:  # to the parser, a text file is an empty graph
        raise unreadable
    return parsed


def check_tensors(network: Any, job: EngineJob) -> None:
    """Compares the parsed inputs and outputs with the contract.

    Raises:
        ProofError: a name or a type differs.
    """
    kinds = {"FLOAT": "float32", "INT32": "int32", "BOOL": "bool"}
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    found = {tensor.name: kinds.get(tensor.dtype.name, tensor.dtype.name) for tensor in tensors}
    specs: Specs = {**job.spec.inputs, **job.spec.outputs}
    wanted = {name: str(spec.dtype) for name, spec in specs.items()}
    if found != wanted:
        differing = ", ".join(f"{name} {kind}" for name, kind in sorted(found.items() ^ wanted.items()))
        raise ProofError(
            f"{job.onnx.name} is not a {job.graph} of this version: {differing} differ",
            remedy="export it again (--rebuild)",
        )


def _compile(api: Api, job: EngineJob, network: Any, channel: IO[str]) -> None:
    """Builds, and writes the engine to `job.out`."""
    from polygraphy.backend.trt import engine_bytes_from_network
    from polygraphy.exception import PolygraphyException

    def configured(builder: Any, parsed: Any) -> Any:
        return _config(api, job, channel, builder, parsed)

    try:
        engine = engine_bytes_from_network(network, config=configured)
    except PolygraphyException as error:
        raise BackendError(
            f"{api.name} could not build {job.graph}", remedy="--low-memory or a smaller --max-batch, if it is memory"
        ) from error
    with open(job.out, "wb") as file:
        file.write(engine)


def _config(api: Api, job: EngineJob, channel: IO[str], builder: Any, network: Any) -> Any:
    """The builder's configuration; precision is no part of it."""
    options: dict[str, Any] = {
        "profiles": [_profile(profile, job.spec.inputs) for profile in job.profiles],
        "memory_pool_limits": _pools(api, job),
        "progress_monitor": _monitor(api, channel),
        "max_aux_streams": 0 if job.low_memory else None,
    }
    if api.flavour == "rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        config = CreateConfigRTX(**options)(builder, network)
    else:
        from polygraphy.backend.trt import CreateConfig

        config = CreateConfig(**options)(builder, network)
    config.clear_flag(api.trt.BuilderFlag.TF32)  # on by default; fp32 means fp32
    return config


def _profile(profile: Profile, inputs: Specs) -> Any:
    from polygraphy.backend.trt import Profile as Shapes

    shapes = Shapes()
    for name, spec in inputs.items():
        smallest, best, largest = profile.bounds(spec)
        shapes.add(name, min=smallest, opt=best, max=largest)
    return shapes


def _pools(api: Api, job: EngineJob) -> dict[Any, int]:
    """Memory limits. On a Jetson, CPU and GPU share memory: the default, all of it, would starve the build itself."""
    pools, available = api.trt.MemoryPoolType, memory_bytes()[1]
    workspace = job.workspace_bytes
    if workspace is None and not api.traits.builds_without_gpu and (is_tegra() or job.low_memory):
        workspace = max(available // (4 if job.low_memory else 2), _SMALLEST_WORKSPACE)
    limits: dict[Any, int] = {} if workspace is None else {pools.WORKSPACE: workspace}
    if job.low_memory and not api.traits.builds_without_gpu:
        limits[pools.TACTIC_DRAM] = max(available // 2, _SMALLEST_WORKSPACE)
    return limits


def _monitor(api: Api, channel: IO[str]) -> Any:
    """TensorRT's progress as JSON lines; called from its own threads."""
    base: Any = api.trt.IProgressMonitor  # only known once a flavour is imported
    lock = threading.Lock()
    totals: dict[str, int] = {}
    reported = [0.0]

    def say(phase: str, done: int, always: bool) -> None:
        with lock, suppress(OSError):
            if always or time.monotonic() - reported[0] > _REPORT_EVERY_S:
                reported[0] = time.monotonic()
                channel.write(json.dumps({"phase": phase, "done": done, "total": totals.get(phase, 0)}) + "\n")

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            totals[phase] = steps
            say(phase, 0, always=parent is None)

        def step_complete(self, phase: str, step: int) -> bool:
            say(phase, step + 1, always=False)
            return True

        def phase_finish(self, phase: str) -> None:
            say(phase, totals.get(phase, 0), always=False)

    return Monitor()


def _built_with(api: Api, gpu: Gpu | None) -> BuiltWith:
    device = jetson()
    if api.traits.portable or gpu is None:
        return BuiltWith(api.flavour, api.version, RTX_CAPABILITIES)
    return BuiltWith(api.flavour, api.version, (gpu.sm,), gpu.name, device.l4t if device else None)


def _try_out(api: Api, job: EngineJob, built: BuiltWith, gpu: Gpu | None) -> tuple[bool, dict[str, int], list[str]]:
    """Loads the engine and runs it once per profile, where a GPU can: executed, its layers' types, remarks."""
    if gpu is None:
        return False, {}, ["not executed: no NVIDIA driver here, so no engine loads; that is no fault of this one"]
    if not runs_on(built.capabilities, gpu.capability):
        return False, {}, [f"not executed: {gpu.name} has compute capability {gpu.sm}, not one it was built for"]
    from runtime.backends.native.tensorrt import NativeBackend

    file = EngineFile(job.out, job.graph, job.precision, job.spec, sha256_of(job.out), static=len(job.profiles) > 1)
    backend = NativeBackend(job.flavour, BackendOptions())
    try:
        engine = backend.load(file)
        for profile in job.profiles:
            sizes = {"B": profile.images[1], "N": profile.rows[1]}
            inputs = {name: backend.buffer(spec.sized(sizes), spec.numpy) for name, spec in job.spec.inputs.items()}
            outputs = {name: backend.buffer(spec.sized(sizes), spec.numpy) for name, spec in job.spec.outputs.items()}
            engine.run(inputs, outputs)
            for buffer in outputs.values():
                buffer.numpy()
        types = engine.layer_types()
    finally:
        backend.close()
    _check_built(types, job)
    return True, types, []


def _check_built(types: Mapping[str, int], job: EngineJob) -> None:
    """Reads the built engine's types back: a 16-bit graph must have left 16-bit layers.

    Raises:
        ProofError: it did not.
    """
    wanted = {"int8-weights": "fp16", "int4-weights": "fp16"}.get(job.precision, job.precision)
    if types and wanted != "fp32" and not {wanted, "region"} & types.keys():
        raise ProofError(
            f"{job.graph} was asked for in {job.precision}, the built engine computes in {', '.join(sorted(types))}",
            remedy="report this with the versions that `flowturbo-export doctor` prints",
        )


if __name__ == "__main__":
    main()
