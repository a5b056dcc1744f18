"""Build one engine as a child process: `python -m export.tensorrt.worker JOB.json RESULT.json`, run by `build_engine`.

It writes progress as JSON lines to its standard output, logs to standard error, and leaves RESULT.json: what was built,
or the error. It ends when its standard input closes, which happens when the parent dies, for whatever cause.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from export.tensorrt.compiler import EngineBuild, EngineJob, read_rss_bytes
from export.tensorrt.engine_layers import check_types, count_layer_types
from runtime.backends.base import BackendOptions, EngineFile
from runtime.backends.native.trt_api import EngineBuildInfo, TensorRTApi, is_capability_supported, load_api
from runtime.directory.contract import TensorSpecs, rename_former
from runtime.system.cuda_driver import Gpu
from runtime.system.errors import BackendError, FlowTurboError, ProofError
from runtime.system.files import compute_sha256
from runtime.system.hardware import detect_gpus, detect_jetson, is_tegra, read_memory_bytes

RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0+")
"""Compute capabilities that TensorRT-RTX builds for by default. No Hopper; 7.5 only when it is named."""
_SMALLEST_WORKSPACE = 64 << 20
_REPORT_EVERY_S = 0.2


def main() -> None:
    """Build the engine of a job file and leave a result file."""
    job_file, result_file = Path(sys.argv[1]), Path(sys.argv[2])
    job = EngineJob.from_json(json.loads(job_file.read_text(encoding="utf-8")))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent decides and kills
    # Standard output is for progress alone: whatever a library prints goes to the log.
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def exit_with_parent() -> None:
        while os.read(0, 1024):
            pass
        with suppress(OSError):
            job.out.unlink(missing_ok=True)
        os._exit(3)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    try:
        result = _build_engine(job, channel).to_json()
    except FlowTurboError as error:
        parts = {"given": error.given, "allowed": error.allowed, "remedy": error.remedy}
        result = {"error": {"kind": type(error).__name__, **parts}}
    except OSError as error:
        message = f"cannot write {job.out.name}: {error.strerror or error}"
        result = {"error": {"kind": "OutputError", "given": message, "allowed": "", "remedy": "free space"}}
    result_file.write_text(json.dumps(result), encoding="utf-8")
    sys.stderr.flush()
    os._exit(1 if "error" in result else 0)  # what TensorRT does while it unloads cannot spoil a finished build


def _build_engine(job: EngineJob, channel: IO[str]) -> EngineBuild:
    api = load_api(job.flavour)
    devices, _ = detect_gpus()
    gpu = devices[0] if devices else None
    network = parse_network(api, job)
    check_tensors(network[1], job)
    check_types(network[1], job.precision, job.graph)
    layers = count_layer_types(network[1])

    from polygraphy.backend.trt import engine_bytes_from_network
    from polygraphy.exception import PolygraphyException

    try:
        engine = engine_bytes_from_network(
            network, config=lambda builder, parsed: make_config(api, job, channel, builder, parsed)
        )
    except PolygraphyException as error:
        raise BackendError(
            f"{api.name} could not build {job.graph}", remedy="--low-memory or a smaller --max-batch, if it is memory"
        ) from error
    with open(job.out, "wb") as file:
        file.write(engine)
    del network, engine
    built_with = EngineBuildInfo(api.flavour, api.version, RTX_CAPABILITIES)
    if gpu is not None and not api.traits.is_portable:
        jetson = detect_jetson()
        built_with = EngineBuildInfo(api.flavour, api.version, (gpu.sm,), gpu.name, jetson.l4t if jetson else None)
    sha256 = compute_sha256(job.out)
    executed, engine_layers, notes = _run_profiles(job, sha256, built_with, gpu)
    return EngineBuild(
        bytes=job.out.stat().st_size,
        sha256=sha256,
        built=built_with,
        hardware="portable" if api.traits.is_portable else "this GPU",
        seconds=0.0,  # the parent measures them
        peak_rss_bytes=read_rss_bytes("self")[1],
        layers=layers,
        engine_layers=engine_layers,
        executed=executed,
        notes=tuple(notes),
    )


def parse_network(api: TensorRTApi, job: EngineJob) -> Any:
    """Return builder, network and parser of an ONNX file; the network is strongly typed always.

    Raises:
        BackendError: the parser cannot read the file.
    """
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
    """Compare the parsed inputs and outputs with the contract.

    Raises:
        ProofError: a name or a type differs.
    """
    specs: TensorSpecs = {**job.spec.inputs, **job.spec.outputs}
    type_names = {"FLOAT": "float32", "INT32": "int32", "BOOL": "bool"}
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in tensors:  # a file of an older directory becomes an engine with today's names
        if (current := rename_former(tensor.name)) in specs:
            tensor.name = current
    parsed_types = {tensor.name: type_names.get(tensor.dtype.name, tensor.dtype.name) for tensor in tensors}
    contract_types = {name: str(spec.dtype) for name, spec in specs.items()}
    if parsed_types != contract_types:
        differing = ", ".join(
            f"{name} {type_name}" for name, type_name in sorted(parsed_types.items() ^ contract_types.items())
        )
        raise ProofError(
            f"{job.onnx.name} is not a {job.graph} of this version: {differing} differ",
            remedy="export it again (--rebuild)",
        )


def make_config(api: TensorRTApi, job: EngineJob, channel: IO[str], builder: Any, network: Any) -> Any:
    """Return the builder's configuration; precision is no part of it."""
    from polygraphy.backend.trt import Profile as ShapeProfile

    profiles = []
    for profile in job.profiles:
        shapes = ShapeProfile()
        for name, spec in job.spec.inputs.items():
            smallest, best, largest = profile.resolve_bounds(spec)
            shapes.add(name, min=smallest, opt=best, max=largest)
        profiles.append(shapes)
    if api.flavour == "rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX as CreateConfig
    else:
        from polygraphy.backend.trt import CreateConfig
    create_config = CreateConfig(
        profiles=profiles,
        memory_pool_limits=_choose_memory_limits(api, job),
        progress_monitor=_make_monitor(api, channel),
        max_aux_streams=0 if job.low_memory else None,
    )
    config = create_config(builder, network)
    config.clear_flag(api.trt.BuilderFlag.TF32)  # on by default; fp32 means fp32
    return config


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


def _run_profiles(
    job: EngineJob, sha256: str, built_with: EngineBuildInfo, gpu: Gpu | None
) -> tuple[bool, dict[str, int], list[str]]:
    """Run the engine once per profile, where a GPU can: whether it ran, its layers by element type, and remarks."""
    if gpu is None:
        return False, {}, ["not executed: no NVIDIA driver here, so no engine loads; that is no fault of this one"]
    if not is_capability_supported(built_with.capabilities, gpu.capability):
        return False, {}, [f"not executed: {gpu.name} has compute capability {gpu.sm}, not one it was built for"]
    from runtime.backends.native.tensorrt import NativeBackend

    file = EngineFile(job.out, job.graph, job.precision, job.spec, sha256, static=len(job.profiles) > 1)
    backend = NativeBackend(job.flavour, BackendOptions())
    try:
        engine = backend.load(file)
        for profile in job.profiles:
            sizes = {"B": profile.images[1], "N": profile.rows[1]}
            inputs, outputs = (
                {name: backend.allocate(spec.resolve_shape(sizes), spec.numpy_dtype) for name, spec in specs.items()}
                for specs in (job.spec.inputs, job.spec.outputs)
            )
            engine.run(inputs, outputs)
            for buffer in outputs.values():
                buffer.numpy()
        types = engine.count_layer_types()
    finally:
        backend.close()
    expected = {"int8-weights": "fp16", "int4-weights": "fp16"}.get(job.precision, job.precision)
    if types and expected != "fp32" and not {expected, "region"} & types.keys():
        raise ProofError(
            f"{job.graph} was asked for in {job.precision}, the built engine computes in {', '.join(sorted(types))}",
            remedy="report this with the versions that `flowturbo-export doctor` prints",
        )
    return True, types, []


if __name__ == "__main__":
    main()
