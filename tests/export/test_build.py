"""Builds: proved or nothing, resumed after a kill, unchanged ones free, and without torch where there is none."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from golden import Golden, build_tiny_command, measure_relative_difference
from onnx import numpy_helper
from recorded_progress import RecordedProgress

from export.build import BuildResult, build, find_build_reason
from export.build_request import BuildRequest, resolve_request
from export.directory_source import open_directory
from export.proof.verify import measure_psnr_db, measure_relative_error, verify_directory
from export.stage import open_stage
from flowturbo.checkpoints import save_network
from flowturbo.models.sit import SiT, SiTConfig
from flowturbo.models.vae import load_vae
from runtime.directory.manifest import MANIFEST_FILE, PROOF_FILE, read_manifest
from runtime.directory.records import Manifest
from runtime.pipeline import Pipeline
from runtime.system.errors import EngineError, FlowTurboError, OutputError, ProofError, RequestError
from runtime.system.files import compute_sha256
from runtime.system.hardware import detect_cpu

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")
OPTIONS: dict[str, Any] = {"vaes": ["none"], "heads": 4, "targets": ["cpu"], "max_batch": 2}

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnxscript", "diffusers", "transformers", "safetensors"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def nosigma(checkpoints: Path, **options: Any) -> BuildRequest:
    return resolve_request(predictor=checkpoints / "golden_nosigma-predictor.pt", **(OPTIONS | options))


def built(request: BuildRequest, out: Path, **options: Any) -> tuple[BuildResult, list[str]]:
    progress = RecordedProgress()
    return build(request, out, progress=progress, **options), progress.lines


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder / "copy")
    return folder / "copy"


def python(code: str, *, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def changed(folder: Path, how: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    how(data)
    (folder / MANIFEST_FILE).write_text(json.dumps(data), encoding="utf-8")


def finished(out: Path) -> bool:
    return (out / MANIFEST_FILE).exists()


# What a build leaves


def test_a_build_is_proved(tiny_engines: Path) -> None:
    manifest = read_manifest(tiny_engines)
    what = {proof.what: proof for proof in manifest.proofs}
    graphs = [graph.graph for graph in manifest.graphs]
    assert set(what) == {*graphs, "trajectory", "image-small"}
    for name in (*graphs, "trajectory"):
        assert 0 < what[name].relative_error < 1e-5
        assert what[name].tolerance == 1e-4
    assert what["image-small"].psnr_db is not None
    assert what["image-small"].psnr_db > 50
    assert all(engine.executed for engine in manifest.engines)
    assert all("cpu" in proof.by for proof in manifest.proofs)


def test_a_directory_holds_what_its_manifest_names_and_nothing_else(tiny_engines: Path) -> None:
    manifest = read_manifest(tiny_engines)
    files = {path.relative_to(tiny_engines).as_posix() for path in tiny_engines.rglob("*") if path.is_file()}
    assert files == {MANIFEST_FILE, *(record.path for record in manifest.files)}
    assert PROOF_FILE in files
    for record in manifest.files:
        assert compute_sha256(tiny_engines / record.path) == record.sha256
    assert [path.name for path in tiny_engines.parent.iterdir()] == [tiny_engines.name]  # no stage, no lock


def test_the_proof_covers_guided_and_unguided_images_and_the_whole_contract(tiny_engines: Path) -> None:
    with np.load(tiny_engines / PROOF_FILE, allow_pickle=False) as proof:
        assert proof["32/predictor/in/row_image"].tolist() == [0, 1, 1]
        for name in ("base", "slopes", "point_coef", "update_coef", "error_coef", "mods", "mix"):
            assert np.any(proof[f"32/predictor/in/{name}"]), name
        for name in ("slope", "velocities", "x_next", "err", "slope_rms"):
            assert np.any(proof[f"32/refiner/out/{name}"]), name
        settings = json.loads(str(proof["32/trajectory/settings"]))
        assert settings["scales"] == [1.0, 4.0]
        assert settings["sampler"] == {"schedule": "H1P5R3", "solver": None, "steps": None}


# When it is done again


def request_of_tiny(checkpoints: Path, vae: Path, **options: Any) -> BuildRequest:
    """What tests/conftest.py built, but for `options`."""
    same = {"vaes": [str(vae)], "heads": 6, "targets": ["cpu"], "max_batch": 3}
    return resolve_request(
        predictor=checkpoints / "golden_s-predictor.pt",
        refiner=str(checkpoints / "golden_s-refiner.pt"),
        **(same | options),
    )


def test_unchanged_inputs_build_nothing(checkpoints: Path, vae: Path, tiny_engines: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_engines.rglob("*")}
    again, said = built(request_of_tiny(checkpoints, vae), tiny_engines)
    assert (again.is_rebuilt, said) == (False, [])
    assert {path: path.stat().st_mtime_ns for path in tiny_engines.rglob("*")} == before


def test_an_unchanged_build_answers_before_anything_heavy_is_imported(
    checkpoints: Path, vae: Path, tiny_engines: Path
) -> None:
    started = time.perf_counter()
    done = python(
        f"{BLOCKED}\nfrom export.cli.export import main; main({build_tiny_command(checkpoints, vae, tiny_engines)})"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing changed" in done.stdout
    assert time.perf_counter() - started < 10  # 3 s on a quiet machine


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_batch": 4}, "changed: max batch"),
        ({"static_batch": True}, "changed: max batch"),
        ({"resolutions": [16]}, "changed: resolutions"),
        ({"heads": 3}, "changed: heads"),
        ({"encoder": True}, "changed: encoder"),
        ({"targets": ["cpu", "cuda"], "precision": "fp32"}, "changed: precisions"),
        ({"time_direction": "data-to-noise"}, "changed: time direction"),
        ({"vaes": ["none"]}, "changed: vae small"),
    ],
)
def test_a_changed_option_is_named(
    checkpoints: Path, vae: Path, tiny_engines: Path, options: dict[str, Any], reason: str
) -> None:
    assert find_build_reason(request_of_tiny(checkpoints, vae, **options).inputs, tiny_engines) == reason


def test_changed_files_are_named(checkpoints: Path, vae: Path, tiny_engines: Path, tmp_path: Path) -> None:
    inputs = request_of_tiny(checkpoints, vae).inputs
    other = tmp_path / "predictor.pt"
    other.write_bytes((checkpoints / "golden_s-predictor.pt").read_bytes() + b" ")
    touched = resolve_request(
        predictor=other,
        refiner=str(checkpoints / "golden_s-refiner.pt"),
        vaes=[str(vae)],
        heads=6,
        targets=["cpu"],
        max_batch=3,
    )
    assert find_build_reason(touched.inputs, tiny_engines) == "changed: predictor"
    assert "no engine directory" in find_build_reason(inputs, tmp_path / "new")
    copy = copied(tiny_engines, tmp_path)
    assert find_build_reason(inputs, copy) == ""
    path = copy / read_manifest(copy).graphs[1].path
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert find_build_reason(inputs, copy) == f"{read_manifest(copy).graphs[1].path} was altered"
    path.unlink()
    assert "missing" in find_build_reason(inputs, copy)


# What stops it


def check_external(out: Path, manifest: Manifest) -> None:
    """A directory whose weights lie beside their graphs: they are named, hashed, movable, and guarded."""
    data = [graph.data for graph in manifest.graphs if graph.data is not None]
    assert data == ["64/fp32/predictor.onnx.data", "32/fp32/conditioning.onnx.data", "32/fp32/predictor.onnx.data"]
    assert {record.path for record in manifest.files} == {PROOF_FILE, *(graph.path for graph in manifest.graphs), *data}
    moved = out.rename(out.parent / "moved")
    for resolution in (32, 64):
        with Pipeline.load(moved, resolution=resolution, threads=1) as pipeline:
            latents = pipeline.run(pipeline.request(["golden retriever"], solver="euler", steps=1)).latents
            assert latents.shape == (1, 4, resolution // 8, resolution // 8)
    path = moved / data[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"predictor\.onnx\.data was altered"):
        Pipeline.load(moved)


def test_force_keeps_what_missed_its_tolerance_and_says_so(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.proof.verify.TOLERANCES", {"fp32": 1e-12})
    with pytest.raises(ProofError):
        build(open_directory(tiny_engines, {"cpu": "fp32"}), tmp_path / "strict")
    assert not finished(tmp_path / "strict")
    kept = build(open_directory(tiny_engines, {"cpu": "fp32"}), tmp_path / "forced", force=True)
    assert finished(tmp_path / "forced")
    assert any("off by" in note for note in kept.manifest.notes)


def test_a_build_that_is_killed_and_then_misses_its_tolerance(checkpoints: Path, tmp_path: Path) -> None:
    """Nothing that looks finished is left either time, and every next try goes on from the last finished graph."""
    out = tmp_path / "engines"
    done = kill_after_the_first_graph(checkpoints, out)
    assert not out.exists()
    assert done[0] == "conditioning"

    request, progress = nosigma(checkpoints, resolutions=[64, 32]), RecordedProgress()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.proof.verify.TOLERANCES", {"fp32": 1e-12})
        patch.setattr(
            "export.graphs.onnx_files.EXTERNAL_BYTES", 1000
        )  # weights beside the graphs, as large models have them
        with pytest.raises(ProofError) as caught:
            build(request, out, progress=progress)
    wanted = [f"exporting {r} px fp32: {graph}" for r in (64, 32) for graph in ("conditioning", "predictor")]
    assert [line for line in progress.lines if line.startswith("exporting")] == wanted[len(done) :]
    assert not out.exists()
    assert "conditioning at 64 px" in caught.value.given
    assert "'mods'" in caught.value.given
    assert caught.value.allowed == "1e-12"
    assert "--precision" in caught.value.remedy

    result, said = built(request, out)
    assert result.is_rebuilt
    assert not [line for line in said if line.startswith("exporting")]
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]
    check_external(out, result.manifest)


def kill_after_the_first_graph(checkpoints: Path, out: Path) -> list[str]:
    """Starts a build of two resolutions, kills it, and gives the graphs that it had finished."""
    words = ["build-engines", "--predictor", checkpoints / "golden_nosigma-predictor.pt", "--vae", "none", "--heads", 4,
             "--target", "cpu", "--max-batch", 2, "--resolution", 64, "--resolution", 32, "--out", out]  # fmt: skip
    code = f"from export.cli.export import main; main({[str(word) for word in words]})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    state, deadline = out.with_name(f".{out.name}.building") / "stage.json", time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state.exists(), "killed too early"
    return [graph["graph"] for graph in json.loads(state.read_text())["graphs"]]


def test_two_builds_do_not_share_a_stage(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    with open(tmp_path / ".engines.lock", "w", encoding="ascii") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OutputError) as caught:
            built(nosigma(checkpoints), out)
    assert "another build" in caught.value.given
    assert not out.exists()


@pytest.mark.parametrize("content", ["thesis.tex", "manifest.json"])
def test_a_folder_with_other_things_is_not_replaced(checkpoints: Path, tmp_path: Path, content: str) -> None:
    """Not even one whose manifest.json is another program's."""
    (tmp_path / content).write_text('{"name": "my web page", "icons": []}', encoding="utf-8")
    with pytest.raises(OutputError) as caught:
        built(nosigma(checkpoints), tmp_path)
    assert "other things" in caught.value.given
    assert (tmp_path / content).exists()


def test_a_file_in_the_way(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "engines"):
        with pytest.raises(OutputError) as caught:
            built(nosigma(checkpoints), out)
        assert str(tmp_path / "file") in caught.value.given
        assert caught.value.remedy


# Proving again


def test_verify_proves_everything_again(tiny_engines: Path) -> None:
    records, skipped = verify_directory(tiny_engines, read_manifest(tiny_engines))
    assert skipped == []
    assert [record.what for record in records] == [proof.what for proof in read_manifest(tiny_engines).proofs]


def alter_weight(folder: Path, graph: str) -> str:
    """Changes one weight of an ONNX file by a little; gives its path."""
    record = next(r for r in read_manifest(folder).graphs if r.graph == graph)
    model = onnx.load(folder / record.path)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[np.abs(values).argmax()] *= 1.5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / record.path)
    return record.path


def rewrite_hash(folder: Path, path: str) -> None:
    def rewrite(data: dict[str, Any]) -> None:
        record = next(record for record in data["files"] if record["path"] == path)
        record.update(sha256=compute_sha256(folder / path), bytes=(folder / path).stat().st_size)

    changed(folder, rewrite)


def test_verify_finds_an_altered_weight_behind_rewritten_hashes(tiny_engines: Path, tmp_path: Path) -> None:
    folder = copied(tiny_engines, tmp_path)
    path = alter_weight(folder, "predictor")
    with pytest.raises(EngineError, match="predictor"):
        verify_directory(folder, read_manifest(folder))
    rewrite_hash(folder, path)
    with pytest.raises(ProofError, match="not the file that was proved"):
        verify_directory(folder, read_manifest(folder))
    with np.load(folder / PROOF_FILE, allow_pickle=False) as proof:
        arrays = dict(proof)
    hashes = json.loads(str(arrays["hashes"]))
    hashes[path] = compute_sha256(folder / path)
    np.savez(folder / PROOF_FILE, **(arrays | {"hashes": np.asarray(json.dumps(hashes))}))
    rewrite_hash(folder, PROOF_FILE)
    with pytest.raises(ProofError) as caught:  # every hash fits; the numbers do not
        verify_directory(folder, read_manifest(folder))
    assert "predictor at 32 px" in caught.value.given


@pytest.mark.parametrize("name", [PROOF_FILE, "32/fp32/decoder-small.onnx"])
def test_verify_finds_a_flipped_byte(tiny_engines: Path, tmp_path: Path, name: str) -> None:
    folder = copied(tiny_engines, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(EngineError, match="altered or damaged"):
        verify_directory(folder, read_manifest(folder))


# On a device with neither torch nor the checkpoint


def test_without_torch_a_directory_is_built_from_another_verified_and_inspected(
    tiny_engines: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engines"
    for words in (
        ["build-engines", "--from", tiny_engines, "--target", "cpu", "--out", out],
        ["verify", out],
        ["inspect", "--json", out],
    ):
        done = python(f"{BLOCKED}\nfrom export.cli.export import main; main({[str(word) for word in words]})")
        assert done.returncode == 0, done.stderr
    assert [graph["graph"] for graph in json.loads(done.stdout)["graphs"]][:2] == ["conditioning", "predictor"]
    assert read_manifest(out).key == read_manifest(tiny_engines).key
    assert compute_sha256(out / PROOF_FILE) == compute_sha256(tiny_engines / PROOF_FILE)


def test_the_blocker_blocks() -> None:
    done = python(f"{BLOCKED}\nimport torch")
    assert done.returncode == 1
    assert "torch is blocked" in done.stderr


def test_building_from_checkpoints_without_torch_says_what_to_install(checkpoints: Path, tmp_path: Path) -> None:
    words = [
        "build-engines",
        "--predictor",
        checkpoints / "golden_s-predictor.pt",
        "--vae",
        "none",
        "--target",
        "cpu",
        "--out",
        tmp_path / "x",
    ]
    done = python(f"{BLOCKED}\nfrom export.cli.export import main; main({[str(word) for word in words]})")
    assert done.returncode == 1
    assert "flowturbo[export]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_engines_are_added_to_a_directory_in_place(tiny_engines: Path, tmp_path: Path) -> None:
    folder = copied(tiny_engines, tmp_path)
    with_cuda = build(open_directory(folder, {"cuda": "fp32"}), folder).manifest
    assert with_cuda.list_targets() == ["cpu", "cuda"]
    assert read_manifest(folder) == with_cuda
    executed = {engine.target: engine.executed for engine in with_cuda.engines}
    assert executed == {"cpu": True, "cuda": False}
    assert all("cuda not executed" in proof.by for proof in with_cuda.proofs if proof.target == "cuda")
    assert not build(open_directory(folder, {"cuda": "fp32"}), folder).is_rebuilt


def test_a_precision_that_the_files_do_not_have_is_refused(tiny_engines: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        open_directory(tiny_engines, {"cuda": "fp16"})
    assert "fp16" in caught.value.given
    assert "fp32" in caught.value.allowed
    assert "--precision" in caught.value.remedy


# Precision


@pytest.fixture(scope="module")
def half(checkpoints: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp16 for CUDA at 16 px, of a fixed batch of two, with the encoder; without a GPU the CPU proves its graphs."""
    out = tmp_path_factory.mktemp("half") / "engines"
    options = {"vaes": [str(vae)], "targets": ["cuda"], "precision": "fp16", "static_batch": True, "encoder": True}
    build(nosigma(checkpoints, **options), out)
    return out


def test_a_graph_in_half_precision_is_proved_and_said_not_to_have_run_on_its_device(half: Path) -> None:
    manifest = read_manifest(half)
    assert {graph.precision for graph in manifest.graphs} == {"fp16"}
    assert not any(engine.executed for engine in manifest.engines)
    proofs = {proof.what: proof for proof in manifest.proofs}
    assert set(proofs) == {"conditioning", "predictor", "decoder-small", "encoder", "trajectory", "image-small"}
    assert all("not executed" in proof.by for proof in manifest.proofs)
    assert 1e-6 < proofs["predictor"].relative_error < 2e-2
    assert proofs["image-small"].psnr_db is not None
    assert proofs["image-small"].psnr_db >= 30


def test_norms_and_the_time_embedding_stay_in_float32(half: Path) -> None:
    for graph, ops in (("predictor", {"LayerNormalization"}), ("conditioning", {"Cos", "Sin"})):
        model = onnx.shape_inference.infer_shapes(onnx.load(half / f"16/fp16/{graph}.onnx"))
        types = {
            value.name: value.type.tensor_type.elem_type
            for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]
        }
        found = [node for node in model.graph.node if node.op_type in ops]
        assert {node.op_type for node in found} == ops
        assert {types[node.input[0]] for node in found} == {onnx.TensorProto.FLOAT}
        products = {
            types[node.output[0]]
            for node in model.graph.node
            if node.op_type in ("MatMul", "Gemm") and node.output[0] in types
        }
        assert onnx.TensorProto.FLOAT16 in products
        weights = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 1000]
        assert {tensor.data_type for tensor in weights if "pos" not in tensor.name} == {onnx.TensorProto.FLOAT16}


def test_a_fixed_batch_is_filled_up_and_cut_again(half: Path) -> None:
    with Pipeline.load(half, provider="cpu", threads=1) as pipeline:
        assert pipeline.precision == "fp16"
        assert pipeline.manifest.static_batch
        result = pipeline.run(pipeline.request([1, 2, 3], solver="euler", steps=2, guidance=[1.0, 4.0, 1.0]))
        alone = pipeline.run(pipeline.request([3], seeds=[2], solver="euler", steps=2, guidance=1.0))
        sizes = pipeline._loop.workspaces.list_sizes()  # images and rows that engines were asked for
    assert result.latents.shape == (3, 4, 8, 8)
    assert result.images is not None
    assert result.images.shape == (3, 16, 16, 3)
    assert result.usage.calls["predictor"] == 4
    assert measure_relative_difference(result.latents[2], alone.latents[0]) < 1e-2
    assert sizes == {(2, 2), (2, 4)}  # the two sizes a static engine has, though one of two images was guided


def test_a_provider_that_cannot_keep_the_precision_is_refused(half: Path) -> None:
    with pytest.raises(FlowTurboError) as caught:
        Pipeline.load(half, provider="openvino")
    assert "own precision" in caught.value.given
    assert "--target openvino" in caught.value.remedy


def test_the_encoder_is_the_autoencoders(half: Path, vae: Path) -> None:
    with np.load(half / PROOF_FILE, allow_pickle=False) as proof:
        images, mean, std = (proof[f"16/encoder/{name}"] for name in ("in/images", "out/mean", "out/std"))
    assert (images.min() >= 0, images.max() <= 1) == (True, True)
    with torch.inference_mode():
        expected = load_vae(str(vae)).encode(torch.from_numpy(images))
    assert measure_relative_difference(mean, expected[0]) < 1e-5
    assert measure_relative_difference(std, expected[1]) < 1e-5


def test_a_weight_that_half_precision_cannot_hold_is_named(checkpoints: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoints / "golden_nosigma-predictor.pt", weights_only=True)
    state["blocks.0.mlp.fc1.bias"][3] = 1e6
    torch.save(state, tmp_path / "huge.pt")
    request = resolve_request(
        predictor=tmp_path / "huge.pt", vaes=["none"], heads=4, targets=["cuda"], precision="fp16", max_batch=2
    )
    with pytest.raises(FlowTurboError) as caught:
        built(request, tmp_path / "engines")
    assert "blocks.0.mlp.fc1.bias (1e+06)" in caught.value.given
    assert "bf16" in caught.value.remedy


def test_openvino_computes_in_what_was_built_and_says_so(
    openvino_engines: Path, golden_nosigma: Golden, tmp_path: Path
) -> None:
    """The same ONNX file in bf16: chosen by a build, written in the manifest, and visible in the numbers where the CPU has it."""
    out = tmp_path / "bf16"
    manifest = build(open_directory(openvino_engines, {"openvino": "bf16"}), out).manifest
    assert {engine.precision for engine in manifest.engines if engine.target == "openvino"} == {"bf16"}
    assert {graph.precision for graph in manifest.graphs} == {"fp32"}
    errors = {}
    for folder in (openvino_engines, out):
        with Pipeline.load(folder, threads=1) as pipeline:
            request = pipeline.request(
                [int(y) for y in golden_nosigma.arrays["y"]], solver="heun", steps=10, guidance=1.5
            )
            errors[pipeline.precision] = measure_relative_difference(
                pipeline.run(request, noise=golden_nosigma.arrays["x"]).latents, golden_nosigma.arrays["ode/heun2/11"]
            )
    assert errors["fp32"] < 1e-4
    assert errors["bf16"] < 5e-2
    if "amx_bf16" in detect_cpu().features:
        assert errors["bf16"] > 5e-4


# How errors are measured


def test_errors_of_proofs() -> None:
    expected = np.asarray([[1.0, -4.0], [2.0, 2.0]])
    assert measure_relative_error(expected + 0.4, expected, "fp32") == pytest.approx(0.1)
    assert measure_relative_error(expected, expected, "fp16") == 0
    assert measure_relative_error(expected * 1.01, expected, "bf16") == pytest.approx(0.01)
    worse = expected.copy()
    worse[1] += 100
    assert measure_relative_error(worse, expected, "fp16", unguided=True) == 0
    assert np.isnan(measure_relative_error(expected * np.nan, expected, "fp32"))
    assert measure_psnr_db(expected, expected) == 120
    assert measure_psnr_db(expected + 0.1, expected) == pytest.approx(20)


def test_a_nan_is_no_small_error(tiny_engines: Path, tmp_path: Path) -> None:
    folder = copied(tiny_engines, tmp_path)
    manifest = read_manifest(folder)
    with np.load(folder / PROOF_FILE, allow_pickle=False) as proof:
        arrays = dict(proof)
    arrays["32/predictor/out/err"][:] = np.nan
    np.savez(folder / PROOF_FILE, **arrays)
    record = replace(
        manifest.find_file(PROOF_FILE),
        sha256=compute_sha256(folder / PROOF_FILE),
        bytes=(folder / PROOF_FILE).stat().st_size,
    )
    files = tuple(record if file.path == PROOF_FILE else file for file in manifest.files)
    with pytest.raises(ProofError, match="'err' is off by nan"):
        verify_directory(folder, replace(manifest, files=files))


# What is never replaced


def test_a_folder_of_years_is_not_an_engine_directory(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "photos" / "2023").mkdir(parents=True)
    (tmp_path / "photos" / "2023" / "a.jpg").write_bytes(b"precious")
    request = resolve_request(
        predictor=checkpoints / "golden_nosigma-predictor.pt", heads=4, vaes=["none"], targets=["cpu"]
    )
    with pytest.raises(OutputError) as caught:
        build(request, tmp_path / "photos")
    assert "2023" in caught.value.given
    assert (tmp_path / "photos" / "2023" / "a.jpg").read_bytes() == b"precious"


def test_engines_of_another_model_are_replaced_only_when_told(
    tiny_engines: Path, checkpoints: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(tiny_engines, tmp_path / "engines")
    request = resolve_request(
        predictor=checkpoints / "golden_nosigma-predictor.pt", heads=4, vaes=["none"], targets=["cpu"]
    )
    with pytest.raises(OutputError, match="another predictor"):
        build(request, out)
    assert read_manifest(out) == read_manifest(tiny_engines)
    assert build(request, out, rebuild=True).is_rebuilt


def test_a_build_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "engines"
    with pytest.raises(RuntimeError), open_stage(out, "key") as stage:
        assert stage.folder.is_dir()
        raise RuntimeError("before the first graph")
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_label_dropout_is_not_guided_unless_asked_for(tmp_path: Path) -> None:
    """Its null label was never trained: the directory says so, and more guidance warns."""
    facts = {"label_dropout": 0.0, "guidance": 1.0}
    save_network(tmp_path / "a.safetensors", SiT(SiTConfig(1, 16, 2, 2, 4, classes=2)), role="predictor", extra=facts)
    request = resolve_request(predictor=tmp_path / "a.safetensors", refiner="none", vaes=["none"], targets=["cpu"])
    build(request, tmp_path / "engines")
    manifest = read_manifest(tmp_path / "engines")
    assert (manifest.model.label_dropout, manifest.defaults.guidance) == (0.0, 1.0)
    assert any("--label-dropout 0" in note for note in manifest.notes)
    with Pipeline.load(tmp_path / "engines") as pipeline:
        pipeline.request(0)  # the default, without a warning
        pipeline.request(0, guidance=4.0, negative=1)  # moves away from a label that was trained
        with pytest.warns(UserWarning, match="guidance 4: the model was trained without label dropout"):
            pipeline.request(0, guidance=4.0)
