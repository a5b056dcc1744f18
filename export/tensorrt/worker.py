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

from export.tensorrt.compiler import EngineJob, read_rss_bytes
from export.tensorrt.engine_layers import check_types, count_layer_types
from runtime.backends.base import BackendOptions, EngineFile
from runtime.backends.native.trt_api import EngineBuildInfo, TensorRTApi, is_capability_supported, load_api
from runtime.directory.contract import Profile, TensorSpecs
from runtime.system.cuda_driver import Gpu
from runtime.system.errors import BackendError, FlowTurboError, ProofError
from runtime.system.files import compute_sha256
from runtime.system.hardware import detect_gpus, detect_jetson, is_tegra, read_memory_bytes

RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0+")
"""What TensorRT-RTX builds for unless told otherwise. No Hopper; 7.5 only when it is named."""
_SMALLEST_WORKSPACE = 64 << 20
_REPORT_EVERY_S = 0.2


def main() -> None:
    """Builds the engine of a job file and leaves a result file."""
    job_file, result_file = Path(sys.argv[1]), Path(sys.argv[2])
    job = EngineJob.from_json(json.loads(job_file.read_text(encoding="utf-8")))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent decides and kills
    channel = _open_progress_channel()
    threading.Thread(target=_exit_with_parent, args=(job.out,), daemon=True).start()
    try:
        result = _build_engine(job, channel)
    except FlowTurboError as error:
        error_data = {
            "kind": type(error).__name__,
            "given": error.given,
            "allowed": error.allowed,
            "remedy": error.remedy,
        }
        result = {"error": error_data}
    except OSError as error:
        message = f"cannot write {job.out.name}: {error.strerror or error}"
        result = {"error": {"kind": "OutputError", "given": message, "allowed": "", "remedy": "free space"}}
    result_file.write_text(json.dumps(result), encoding="utf-8")
    sys.stderr.flush()
    os._exit(1 if "error" in result else 0)  # what TensorRT does while it unloads cannot spoil a finished build


def _open_progress_channel() -> IO[str]:
    """Standard output for progress alone: whatever a library prints goes to the log."""
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _exit_with_parent(out: Path) -> None:
    while os.read(0, 1024):
        pass
    with suppress(OSError):
        out.unlink(missing_ok=True)
    os._exit(3)


def _build_engine(job: EngineJob, channel: IO[str]) -> dict[str, Any]:
    api = load_api(job.flavour)
    devices, _ = detect_gpus()
    gpu = devices[0] if devices else None
    network = _parse_network(api, job)
    check_tensors(network[1], job)
    check_types(network[1], job.precision, job.graph)
    layers = count_layer_types(network[1])
    _compile_network(api, job, network, channel)
    del network
    built_with = _describe_builder(api, gpu)
    executed, engine_layers, notes = _run_profiles(api, job, built_with, gpu)
    return {
        "built": built_with.to_json(),
        "hardware": "portable" if api.traits.is_portable else "this GPU",
        "layers": layers,
        "engine_layers": engine_layers,
        "executed": executed,
        "notes": notes,
        "peak_rss_bytes": read_rss_bytes("self")[1],
    }


def _parse_network(api: TensorRTApi, job: EngineJob) -> Any:
    """Builder, network and parser of an ONNX file, strongly typed always."""
    from polygraphy.backend.trt import network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    unreadable = BackendError(
        f"{api.name} cannot read {job.onnx.name}",
        remedy="the file is damaged or holds an operation it lacks; export it again (--rebuild)",
    )
    try:
        parsed = network_from_onnx_path(str(job.onnx), strongly_typed=api.traits.needs_typed_flag)
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
    type_names = {"FLOAT": "float32", "INT32": "int32", "BOOL": "bool"}
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    parsed_types = {tensor.name: type_names.get(tensor.dtype.name, tensor.dtype.name) for tensor in tensors}
    specs: TensorSpecs = {**job.spec.inputs, **job.spec.outputs}
    contract_types = {name: str(spec.dtype) for name, spec in specs.items()}
    if parsed_types != contract_types:
        differing = ", ".join(
            f"{name} {type_name}" for name, type_name in sorted(parsed_types.items() ^ contract_types.items())
        )
        raise ProofError(
            f"{job.onnx.name} is not a {job.graph} of this version: {differing} differ",
            remedy="export it again (--rebuild)",
        )


def _compile_network(api: TensorRTApi, job: EngineJob, network: Any, channel: IO[str]) -> None:
    """Builds, and writes the engine to `job.out`."""
    from polygraphy.backend.trt import engine_bytes_from_network
    from polygraphy.exception import PolygraphyException

    def configure(builder: Any, parsed: Any) -> Any:
        return _make_config(api, job, channel, builder, parsed)

    try:
        engine = engine_bytes_from_network(network, config=configure)
    except PolygraphyException as error:
        raise BackendError(
            f"{api.name} could not build {job.graph}", remedy="--low-memory or a smaller --max-batch, if it is memory"
        ) from error
    with open(job.out, "wb") as file:
        file.write(engine)


def _make_config(api: TensorRTApi, job: EngineJob, channel: IO[str], builder: Any, network: Any) -> Any:
    """The builder's configuration; precision is no part of it."""
    options: dict[str, Any] = {
        "profiles": [_make_profile(profile, job.spec.inputs) for profile in job.profiles],
        "memory_pool_limits": _choose_memory_limits(api, job),
        "progress_monitor": _make_monitor(api, channel),
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


def _make_profile(profile: Profile, inputs: TensorSpecs) -> Any:
    from polygraphy.backend.trt import Profile as Shapes

    shapes = Shapes()
    for name, spec in inputs.items():
        smallest, best, largest = profile.resolve_bounds(spec)
        shapes.add(name, min=smallest, opt=best, max=largest)
    return shapes


def _choose_memory_limits(api: TensorRTApi, job: EngineJob) -> dict[Any, int]:
    """Memory limits. On a Jetson, CPU and GPU share memory: the default, all of it, would starve the build itself."""
    pools, available = api.trt.MemoryPoolType, read_memory_bytes()[1]
    workspace = job.workspace_bytes
    if workspace is None and not api.traits.can_build_without_gpu and (is_tegra() or job.low_memory):
        workspace = max(available // (4 if job.low_memory else 2), _SMALLEST_WORKSPACE)
    limits: dict[Any, int] = {} if workspace is None else {pools.WORKSPACE: workspace}
    if job.low_memory and not api.traits.can_build_without_gpu:
        limits[pools.TACTIC_DRAM] = max(available // 2, _SMALLEST_WORKSPACE)
    return limits


def _make_monitor(api: TensorRTApi, channel: IO[str]) -> Any:
    """TensorRT's progress as JSON lines; called from its own threads."""
    base: Any = api.trt.IProgressMonitor  # only known once a flavour is imported
    lock = threading.Lock()
    totals: dict[str, int] = {}
    reported = [0.0]

    def write_progress(phase: str, done: int, always: bool) -> None:
        with lock, suppress(OSError):
            if always or time.monotonic() - reported[0] > _REPORT_EVERY_S:
                reported[0] = time.monotonic()
                channel.write(json.dumps({"phase": phase, "done": done, "total": totals.get(phase, 0)}) + "\n")

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            totals[phase] = steps
            write_progress(phase, 0, always=parent is None)

        def step_complete(self, phase: str, step: int) -> bool:
            write_progress(phase, step + 1, always=False)
            return True

        def phase_finish(self, phase: str) -> None:
            write_progress(phase, totals.get(phase, 0), always=False)

    return Monitor()


def _describe_builder(api: TensorRTApi, gpu: Gpu | None) -> EngineBuildInfo:
    device = detect_jetson()
    if api.traits.is_portable or gpu is None:
        return EngineBuildInfo(api.flavour, api.version, RTX_CAPABILITIES)
    return EngineBuildInfo(api.flavour, api.version, (gpu.sm,), gpu.name, device.l4t if device else None)


def _run_profiles(
    api: TensorRTApi, job: EngineJob, built_with: EngineBuildInfo, gpu: Gpu | None
) -> tuple[bool, dict[str, int], list[str]]:
    """Loads the engine and runs it once per profile, where a GPU can: executed, its layers' types, remarks."""
    if gpu is None:
        return False, {}, ["not executed: no NVIDIA driver here, so no engine loads; that is no fault of this one"]
    if not is_capability_supported(built_with.capabilities, gpu.capability):
        return False, {}, [f"not executed: {gpu.name} has compute capability {gpu.sm}, not one it was built for"]
    from runtime.backends.native.tensorrt import NativeBackend

    file = EngineFile(
        job.out, job.graph, job.precision, job.spec, compute_sha256(job.out), static=len(job.profiles) > 1
    )
    backend = NativeBackend(job.flavour, BackendOptions())
    try:
        engine = backend.load(file)
        for profile in job.profiles:
            sizes = {"B": profile.images[1], "N": profile.rows[1]}
            inputs = {
                name: backend.allocate(spec.resolve_shape(sizes), spec.numpy_dtype)
                for name, spec in job.spec.inputs.items()
            }
            outputs = {
                name: backend.allocate(spec.resolve_shape(sizes), spec.numpy_dtype)
                for name, spec in job.spec.outputs.items()
            }
            engine.run(inputs, outputs)
            for buffer in outputs.values():
                buffer.numpy()
        types = engine.count_layer_types()
    finally:
        backend.close()
    _check_engine_types(types, job)
    return True, types, []


def _check_engine_types(types: Mapping[str, int], job: EngineJob) -> None:
    """Reads the built engine's types back: a 16-bit graph must have left 16-bit layers.

    Raises:
        ProofError: it did not.
    """
    expected = {"int8-weights": "fp16", "int4-weights": "fp16"}.get(job.precision, job.precision)
    if types and expected != "fp32" and not {expected, "region"} & types.keys():
        raise ProofError(
            f"{job.graph} was asked for in {job.precision}, the built engine computes in {', '.join(sorted(types))}",
            remedy="report this with the versions that `flowturbo-export doctor` prints",
        )


if __name__ == "__main__":
    main()
