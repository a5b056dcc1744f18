"""Real TensorRT-RTX builds, which need no GPU: a tiny SiT's graphs through NVIDIA's parser and compiler."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from recorded_progress import RecordedProgress

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("polygraphy")
torch = pytest.importorskip("torch")

from export.graphs.engine_graphs import ConditioningGraph, DecoderGraph, PredictorGraph, RefinerGraph, make_deployable  # noqa: E402
from export.graphs.onnx_files import export_onnx  # noqa: E402
from export.lowbit.casting import Float32GroupNorm, restore_float32_norms  # noqa: E402
from export.tensorrt.compiler import EngineBuild, EngineJob, build_engine, check_builder  # noqa: E402
from flowturbo.models.sit import SiT, SiTConfig, build_refiner_config  # noqa: E402
from runtime.backends.native.trt_api import EngineBuildInfo  # noqa: E402
from runtime.directory.contract import CONDITIONING_PROFILE, GraphSpec, Profile, build_graph_spec, build_profiles  # noqa: E402
from runtime.system import hardware  # noqa: E402
from runtime.system.errors import BackendError, OutputError, ProofError  # noqa: E402
from runtime.system.progress import Progress  # noqa: E402

ROOT = Path(__file__).parents[3]
CONFIG = SiTConfig(depth=2, width=64, heads=2, patch=2, latent_size=8, classes=10)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
HAS_GPU = bool(hardware.detect_gpus()[0])


def spec_of(graph: str) -> GraphSpec:
    config = build_refiner_config(CONFIG) if graph == "refiner" else CONFIG
    return build_graph_spec(graph, channels=4, side=8, pixels=64, modulations=config.modulations)


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX files of a tiny SiT, named GRAPH-PRECISION.onnx."""
    folder = tmp_path_factory.mktemp("onnx")
    for graph, kind, precision in (
        ("predictor", PredictorGraph, "fp16"),
        ("predictor", PredictorGraph, "fp32"),
        ("refiner", RefinerGraph, "fp16"),
        ("conditioning", ConditioningGraph, "fp16"),
    ):
        torch.manual_seed(0)
        config = build_refiner_config(CONFIG) if graph == "refiner" else CONFIG
        model = make_deployable(SiT(config)).to(DTYPES[precision])
        for weight in model.parameters():
            weight.normal_(std=0.05)
        export_onnx(kind(model), spec_of(graph), folder / f"{graph}-{precision}.onnx")
    return folder


def job(
    onnx: Path, out: Path, graph: str = "predictor", precision: str = "fp16", sizes: tuple[Profile, ...] = ()
) -> EngineJob:
    sizes = sizes or (CONDITIONING_PROFILE if graph == "conditioning" else build_profiles(4, static=False))
    return EngineJob(onnx / f"{graph}-{precision}.onnx", out, graph, "rtx", precision, spec_of(graph), sizes)


def workers(marker: Path) -> list[int]:
    """Processes with a path below `marker` on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(marker).encode() in command and b"export.tensorrt.worker" in command:
                found.append(int(entry.name))
    return found


def wait_until_gone(marker: Path) -> None:
    deadline = time.monotonic() + 20
    while workers(marker):
        assert time.monotonic() < deadline, "the build process lives on"
        time.sleep(0.05)


def test_a_build_gives_an_engine_and_says_what_it_is(onnx: Path, tmp_path: Path) -> None:
    out, progress = tmp_path / "predictor.engine", RecordedProgress()
    built = build_engine(job(onnx, out), progress)
    content = out.read_bytes()
    assert content.startswith(b"vtrt")
    assert built.bytes == len(content)
    assert os.listdir(tmp_path) == ["predictor.engine"]
    assert built.built.flavour == "rtx"
    assert "8.6" in built.built.capabilities
    assert built.executed is HAS_GPU
    assert HAS_GPU or any("not executed" in note for note in built.notes)
    assert built.seconds > 0
    assert built.peak_rss_bytes > 50 << 20
    assert built.layers["NORMALIZATION"] == {"FLOAT": 5}  # two a block and the final one
    assert built.layers["MATRIX_MULTIPLY"] == {"FLOAT": 1, "HALF": 14}  # float32 is the guidance mix alone
    assert json.loads(json.dumps(built.to_json()))["sha256"] == built.sha256
    stages = [
        re.fullmatch(r"building predictor \((\d+) s, (\D+?)( \d+/\d+)?, \d+\.\d GiB\)", line) for line in progress.lines
    ]
    found = [stage.groups() for stage in stages if stage is not None]
    assert len(found) == len(stages) > 0
    assert [int(seconds) for seconds, _, _ in found] == sorted(int(seconds) for seconds, _, _ in found)
    assert any(steps for _, _, steps in found), "TensorRT's own steps are shown"
    assert int(found[-1][0]) <= round(built.seconds)
    assert found[-1][1] != "starting"


@pytest.mark.parametrize(
    ("graph", "precision", "sizes"),
    [
        ("predictor", "fp16", build_profiles(2, static=True)),
        ("predictor", "fp32", build_profiles(4, static=False)),
        ("refiner", "fp16", build_profiles(4, static=False)),
        ("conditioning", "fp16", CONDITIONING_PROFILE),
    ],
)
def test_every_graph_and_both_kinds_of_batch_build(
    onnx: Path, tmp_path: Path, graph: str, precision: str, sizes: tuple[Profile, ...]
) -> None:
    built = build_engine(job(onnx, tmp_path / "x.engine", graph, precision, sizes))
    assert isinstance(built, EngineBuild)
    assert set(built.layers["MATRIX_MULTIPLY"]) <= {"HALF", "FLOAT"}
    assert ("HALF" in built.layers["MATRIX_MULTIPLY"]) is (precision == "fp16")


def test_an_fp16_decoder_keeps_its_norms_in_float32(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from flowturbo.models.vae import wrap_vae

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    module = diffusers.AutoencoderKL(**kinds, block_out_channels=(32, 32), latent_channels=4, layers_per_block=1)
    vae = wrap_vae(module)
    spec = build_graph_spec("decoder-ema", channels=4, side=8, pixels=16, modulations=0)
    vae.module.half()
    export_onnx(DecoderGraph(vae, torch.float16), spec, tmp_path / "half.onnx")
    restore_float32_norms(vae.module)
    export_onnx(DecoderGraph(vae, torch.float16), spec, tmp_path / "islands.onnx")
    sizes = build_profiles(2, static=False)
    out = tmp_path / "decoder.engine"
    with pytest.raises(ProofError, match="normalises in less than float32") as raised:
        build_engine(EngineJob(tmp_path / "half.onnx", out, "decoder-ema", "rtx", "fp16", spec, sizes))
    assert "node_" in raised.value.given
    built = build_engine(EngineJob(tmp_path / "islands.onnx", out, "decoder-ema", "rtx", "fp16", spec, sizes))
    assert set(built.layers["NORMALIZATION"]) == {"FLOAT"}
    assert set(built.layers["CONVOLUTION"]) == {"HALF"}


def test_float32_norm_computes_what_a_float32_groupnorm_does() -> None:
    plain = torch.nn.Sequential(torch.nn.GroupNorm(4, 8))
    torch.nn.init.normal_(plain[0].weight)
    x = torch.randn(2, 8, 6, 6)
    expected = plain(x)
    islands = restore_float32_norms(plain.half())
    assert isinstance(islands[0], Float32GroupNorm)
    assert islands(x.half()).dtype == torch.float16
    np.testing.assert_allclose(islands(x.half()).float().numpy(), expected.detach().numpy(), atol=2e-2)
    assert torch.isfinite(islands((x * 6e4).clamp(-6e4, 6e4).half())).all()


def test_the_network_is_strongly_typed_and_tf32_off(onnx: Path, tmp_path: Path) -> None:
    """In a process of its own: Polygraphy chooses its flavour once, at import."""
    wanted = tmp_path / "job.json"
    wanted.write_text(json.dumps(job(onnx, tmp_path / "x.engine", sizes=build_profiles(2, static=True)).to_json()))
    script = f"""
import io, json
from export.tensorrt.compiler import EngineJob
from export.tensorrt.worker import make_config, parse_network
from runtime.backends.native.trt_api import load_api
api, job = load_api("rtx"), EngineJob.from_json(json.load(open({str(wanted)!r})))
builder, network, parser = parse_network(api, job)
config = make_config(api, job, io.StringIO(), builder, network)
trt = api.trt
print(network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED), config.get_flag(trt.BuilderFlag.TF32),
      config.num_optimization_profiles)
"""
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:] == ["True", "False", "2"]


def test_an_fp32_graph_is_no_fp16_engine(onnx: Path, tmp_path: Path) -> None:
    asked = job(onnx, tmp_path / "x.engine", precision="fp32")
    with pytest.raises(ProofError, match="asked for in fp16") as raised:
        build_engine(EngineJob(**{**vars(asked), "precision": "fp16"}))
    assert "multiplies weights in FLOAT" in raised.value.given
    assert "node_MatMul" in raised.value.given
    assert "fp16" in raised.value.allowed
    assert "--rebuild" in raised.value.remedy
    assert os.listdir(tmp_path) == []


def test_another_graph_under_this_name_is_refused(onnx: Path, tmp_path: Path) -> None:
    asked = job(onnx, tmp_path / "x.engine", "conditioning")
    with pytest.raises(ProofError, match="is not a predictor"):
        build_engine(EngineJob(**{**vars(asked), "graph": "predictor", "spec": spec_of("predictor")}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["text", "cut", "missing"])
def test_a_damaged_onnx_file_is_an_error_that_leaves_nothing(onnx: Path, tmp_path: Path, damage: str) -> None:
    whole = (onnx / "predictor-fp16.onnx").read_bytes()
    folder = tmp_path / "onnx"
    folder.mkdir()
    if damage != "missing":
        (folder / "predictor-fp16.onnx").write_bytes(b"hello" * 100 if damage == "text" else whole[: len(whole) // 2])
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictor.engine").write_bytes(b"the one before")
    with pytest.raises(BackendError, match=r"cannot read predictor-fp16\.onnx") as raised:
        build_engine(job(folder, out / "predictor.engine"))
    assert damage == "text" or "The log ends" in raised.value.given  # a text is no error to the parser: it is empty
    assert raised.value.remedy
    assert os.listdir(out) == ["predictor.engine"]
    assert (out / "predictor.engine").read_bytes() == b"the one before"
    build_engine(job(onnx, out / "predictor.engine"))  # one failure does not hinder the next build
    assert (out / "predictor.engine").read_bytes().startswith(b"vtrt")


def test_an_interrupt_kills_the_build_and_leaves_nothing(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    out = tmp_path / "out"
    out.mkdir()

    class Interrupt(Progress):
        def stage(self, text: str) -> None:
            if re.search(r"\d/\d", text):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(job(onnx, out / "predictor.engine"), Interrupt())
    assert workers(tmp_path) == []
    assert os.listdir(out) == []
    assert os.listdir(tmp_path / "tmp") == []


PARENT = """
import json, signal, sys
from pathlib import Path
from export.tensorrt.compiler import EngineJob, build_engine
from runtime.system.progress import Progress
class Wait(Progress):
    def stage(self, text):
        print(text, flush=True)
        sys.stdin.readline()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
job = EngineJob.from_json(json.loads(Path(sys.argv[1]).read_text()))
build_engine(job, Wait())
"""
"""Says that the child lives, and waits in there: a small engine is sometimes built before a signal arrives."""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_from_the_terminal_or_a_killed_parent_ends_the_build(
    onnx: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "out").mkdir()
    wanted = tmp_path / "job.json"
    wanted.write_text(json.dumps(job(onnx, tmp_path / "out" / "x.engine").to_json()))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(wanted)],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert parent.stdout is not None
    parent.stdout.readline()  # the child lives
    if sent == signal.SIGINT:
        os.killpg(parent.pid, sent)  # as a terminal does: to both
    else:
        parent.kill()
    errors = parent.communicate()[1]
    wait_until_gone(tmp_path)
    assert os.listdir(tmp_path / "out") == [] or sent == signal.SIGKILL
    assert not any(name.endswith(".engine") and name[0] != "." for name in os.listdir(tmp_path / "out"))
    assert b"KeyboardInterrupt" in errors or sent == signal.SIGKILL


def test_a_killed_worker_is_told_with_its_memory(onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Kill(Progress):
        def stage(self, text: str) -> None:
            for pid in workers(tmp_path):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(BackendError, match="was killed by SIGKILL") as raised:
        build_engine(job(onnx, tmp_path / "x.engine"), Kill())
    assert "GiB of memory" in raised.value.given
    assert "--low-memory" in raised.value.remedy
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_said(onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder"):
        build_engine(job(onnx, tmp_path / "nowhere" / "x.engine"))


def test_a_job_survives_json(onnx: Path, tmp_path: Path) -> None:
    asked = job(onnx, tmp_path / "x.engine", sizes=build_profiles(2, static=True))
    assert EngineJob.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    built = EngineBuildInfo("rtx", "1.7", ("8.0", "12.0+"))
    assert EngineBuildInfo.from_json(json.loads(json.dumps(built.to_json()))) == built


@pytest.mark.skipif(hardware.is_tensorrt_installed("tensorrt"), reason="TensorRT is installed here")
def test_a_missing_tensorrt_names_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="TensorRT is not installed") as raised:
        check_builder("tensorrt")
    assert raised.value.remedy == "pip install 'flowturbo[tensorrt]'"
    release = tmp_path / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic")
    monkeypatch.setattr(hardware, "_TEGRA_RELEASE", release)
    with pytest.raises(BackendError) as raised:
        check_builder("tensorrt")
    assert "JetPack's own" in raised.value.remedy
    assert "pip install 'flowturbo[tensorrt]'" not in raised.value.remedy
