"""The native runner as far as a machine without a GPU goes: what it says, chooses and keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends.base import BackendOptions, EngineFile
from runtime.backends.native import trt_api
from runtime.backends.native.profiles import choose_profile
from runtime.backends.native.rtx_cache import RuntimeCacheFile
from runtime.backends.native.tensorrt import RtxBackend, TensorRTBackend, parse_layer_types
from runtime.backends.native.trt_api import (
    EngineBuildInfo,
    LogBuffer,
    check_engine_origin,
    format_install_hint,
    is_capability_supported,
    load_api,
    make_logger,
)
from runtime.directory.contract import Profile, build_profiles, build_trunk_spec
from runtime.system import hardware
from runtime.system.cuda_driver import Gpu
from runtime.system.errors import BackendError, EngineError, RequestError

ROOT = Path(__file__).parents[3]
SPEC = build_trunk_spec(4, 8, 64, refiner=False)
FILE = EngineFile(Path("predictor.engine"), "predictor", "fp16", SPEC, "0" * 64, static=True)
ORIN = Gpu("Orin", (8, 7), 8 << 30, True, "12.6")
ADA = Gpu("RTX 4090", (8, 9), 24 << 30, False, "13.0")
no_gpu = pytest.mark.skipif(bool(hardware.detect_gpus()[0]), reason="there is a GPU here")


def test_it_imports_where_nothing_of_nvidias_is_installed() -> None:
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorrt", "tensorrt_rtx", "cuda", "polygraphy", "torch", "onnx"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import runtime.backends.native.tensorrt, runtime.system.hardware
from runtime.backends.native.trt_api import load_api
try:
    load_api("rtx")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("BackendError TensorRT-RTX cannot be imported")
    assert "pip install 'flowturbo[rtx]'" in done.stdout


@no_gpu
@pytest.mark.parametrize("backend", [TensorRTBackend, RtxBackend])
def test_a_missing_driver_is_no_bad_engine(backend: Any) -> None:
    with pytest.raises(BackendError, match="no NVIDIA driver") as raised:
        backend(BackendOptions())
    assert not isinstance(raised.value, EngineError)
    assert "libcuda" in raised.value.given
    assert "--gpus all" in raised.value.remedy
    assert "an engine is not judged" in raised.value.remedy


@no_gpu
def test_without_a_driver_no_flavour_is_usable() -> None:
    assert not hardware.can_run_tensorrt("rtx")
    assert "libcuda" in hardware.find_tensorrt_problem("tensorrt")


def test_the_real_api_is_known_and_its_log_is_kept() -> None:
    pytest.importorskip("tensorrt_rtx")
    api, text = load_api("rtx"), LogBuffer()
    assert api.name == f"TensorRT-RTX {api.version}"
    assert api.traits.has_runtime_config
    logger = make_logger(api, text)
    engine = api.trt.Runtime(logger).deserialize_cuda_engine(b"no engine at all" * 64)
    assert engine is None
    said = text.drain()
    assert "[ERROR]" in said
    assert "deserializeCudaEngine" in said
    assert text.drain() == ""


def test_everything_the_runner_calls_exists_in_the_real_api() -> None:
    """Names only: what they do was not run here."""
    trt = pytest.importorskip("tensorrt_rtx")
    wanted = {
        trt.Runtime: ["deserialize_cuda_engine", "get_engine_validity"],
        trt.ICudaEngine: [
            "create_engine_inspector", "create_execution_context", "create_runtime_config", "device_memory_size_v2",
            "get_tensor_dtype", "get_tensor_name", "get_tensor_profile_shape", "num_io_tensors",
            "num_optimization_profiles",
        ],
        trt.IExecutionContext: [
            "execute_async_v3", "set_device_memory", "set_input_shape", "set_optimization_profile_async",
            "set_tensor_address",
        ],
        trt.IRuntimeConfig: [
            "create_runtime_cache", "cuda_graph_strategy", "set_execution_context_allocation_strategy",
            "set_runtime_cache",
        ],
        trt.EngineInspector: ["get_engine_information"],
        trt.CudaGraphStrategy: ["WHOLE_GRAPH_CAPTURE"],
        trt.ExecutionContextAllocationStrategy: ["USER_MANAGED"],
        trt.LayerInformationFormat: ["JSON"],
        trt.EngineInvalidityDiagnostics: ["MALFORMED_ENGINE"],
    }  # fmt: skip
    missing = [f"{kind.__name__}.{name}" for kind, names in wanted.items() for name in names if not hasattr(kind, name)]
    assert missing == []


def test_an_unknown_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(trt_api, "RELEASE_TRAITS", {("rtx", 7): trt_api.RELEASE_TRAITS["rtx", 1]})
    with pytest.raises(BackendError, match="does not know") as raised:
        load_api("rtx")
    assert raised.value.allowed == "7.x"
    assert "pip install" in raised.value.remedy


def test_on_a_jetson_tensorrt_is_jetpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert format_install_hint("tensorrt") == "pip install 'flowturbo[tensorrt]'"
    release = tmp_path / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic")
    monkeypatch.setattr(hardware, "_TEGRA_RELEASE", release)
    assert "apt-get install tensorrt" in format_install_hint("tensorrt")
    assert "--system-site-packages" in format_install_hint("tensorrt")
    assert format_install_hint("rtx") == "pip install 'flowturbo[rtx]'"


# Profiles


def bounds(made: tuple[Profile, ...]) -> list[Any]:
    return [tuple(profile.resolve_bounds(spec) for spec in SPEC.inputs.values()) for profile in made]


def shapes(images: int, rows: int) -> Any:
    return tuple(spec.resolve_shape({"B": images, "N": rows}) for spec in SPEC.inputs.values())


def test_a_static_engine_has_an_unguided_and_a_guided_profile() -> None:
    built = bounds(build_profiles(4, static=True))
    assert choose_profile(built, shapes(4, 4), FILE) == 0
    assert choose_profile(built, shapes(4, 8), FILE) == 1


def test_the_profile_tuned_for_the_nearest_size_is_taken() -> None:
    built = bounds((Profile((1, 4, 4), (1, 8, 8)), Profile((1, 1, 4), (1, 2, 8))))
    assert choose_profile(built, shapes(4, 8), FILE) == 0
    assert choose_profile(built, shapes(1, 2), FILE) == 1


@pytest.mark.parametrize(("images", "rows"), [(3, 3), (4, 6), (5, 10)])
def test_a_size_that_was_not_built_lists_the_built_ones(images: int, rows: int) -> None:
    with pytest.raises(RequestError, match=f"{images} images, {rows} rows") as raised:
        choose_profile(bounds(build_profiles(4, static=True)), shapes(images, rows), FILE)
    assert raised.value.allowed == "4 images, 4 rows or 4 images, 8 rows"
    assert "--static-batch" in raised.value.remedy
    with pytest.raises(RequestError) as raised:
        choose_profile(bounds(build_profiles(2, static=False)), shapes(images, rows), FILE)
    assert raised.value.allowed == "1–2 images, 1–4 rows"


# Where an engine may run


@pytest.mark.parametrize(
    ("capabilities", "capability", "fits"),
    [
        (("8.7",), (8, 7), True),
        (("8.7",), (8, 6), False),
        (("8.0", "8.6", "8.9", "12.0+"), (8, 9), True),
        (("8.0", "8.6", "8.9", "12.0+"), (9, 0), False),
        (("8.0", "8.6", "8.9", "12.0+"), (12, 1), True),
        (("8.0", "8.6", "8.9", "12.0+"), (7, 5), False),
    ],
)
def test_runs_on(capabilities: tuple[str, ...], capability: tuple[int, int], fits: bool) -> None:
    assert is_capability_supported(capabilities, capability) is fits


def test_foreign_engines_are_refused_with_both_sides_and_the_command() -> None:
    api = trt_api.TensorRTApi("tensorrt", None, "10.3.0", trt_api.RELEASE_TRAITS["tensorrt", 10])
    check_engine_origin(EngineBuildInfo("tensorrt", "10.3.0", ("8.7",), "Orin", "36.4"), api, ORIN, "rebuild")
    with pytest.raises(EngineError) as raised:
        check_engine_origin(EngineBuildInfo("tensorrt", "10.16.1", ("8.7",)), api, ORIN, "rebuild")
    assert "built with TensorRT 10.16.1; here is TensorRT 10.3.0" in raised.value.given
    assert raised.value.remedy.startswith("rebuild")
    with pytest.raises(EngineError) as raised:
        check_engine_origin(EngineBuildInfo("tensorrt", "10.3.0", ("8.9",), "RTX 4090"), api, ORIN, "rebuild")
    assert "on RTX 4090 for compute capability 8.9; Orin has 8.7" in raised.value.given
    assert "--allow-foreign" in raised.value.remedy


def test_rtx_serves_neither_orin_nor_hopper() -> None:
    hopper = Gpu("H200", (9, 0), 1 << 37, False, "13.0")
    assert hardware.is_gpu_supported("rtx", ADA)
    assert not hardware.is_gpu_supported("rtx", ORIN)
    assert not hardware.is_gpu_supported("rtx", hopper)
    assert hardware.is_gpu_supported("tensorrt", ORIN)
    assert hardware.is_gpu_supported("tensorrt", hopper)


# The JIT's cache


def test_the_runtime_cache_keeps_what_was_written_and_throws_damage_away(tmp_path: Path) -> None:
    cache = RuntimeCacheFile.for_engine(tmp_path / "caches", "sha", "1.7", "RTX", "13.0")
    assert cache.read() == b""
    cache.write(b"kernels")
    assert cache.read() == b"kernels"
    damaged = bytearray(cache.path.read_bytes())
    damaged[-1] ^= 1
    cache.path.write_bytes(damaged)
    assert cache.read() == b""
    assert not cache.path.exists()


def test_the_runtime_cache_depends_on_engine_release_gpu_and_driver(tmp_path: Path) -> None:
    key = ("sha", "1.7", "RTX", "13.0")
    paths = {RuntimeCacheFile.for_engine(tmp_path, *(*key[:i], "other", *key[i + 1 :])).path for i in range(4)}
    assert len(paths | {RuntimeCacheFile.for_engine(tmp_path, *key).path}) == 5


def test_a_runtime_cache_that_fails_stops_nothing(tmp_path: Path) -> None:
    cache = RuntimeCacheFile(tmp_path / "x.rtxcache")
    cache.attach(object())  # a configuration without any of the calls
    cache.save()
    assert not cache.path.exists()


def test_layer_types_are_read_in_either_wording() -> None:
    inspected = """{"Layers": [
        {"Name": "a", "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
        {"Name": "b", "Outputs": [{"Format/Datatype": "Half"}]},
        {"Name": "c", "Outputs": [{"Format/Datatype": "BFloat16"}, {"Format/Datatype": "Float"}]},
        {"Name": "{ForeignNode[x...y]}", "Outputs": [{"Format/Datatype": "Float"}]}]}"""
    assert parse_layer_types(inspected) == {"fp16": 2, "bf16": 1, "fp32": 1, "region": 1}
    assert parse_layer_types("no json") == {}
    assert parse_layer_types('{"Layers": ["names only"]}') == {}
    assert np.sum(list(parse_layer_types(inspected).values())) == 5
