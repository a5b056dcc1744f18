"""The pipeline on real engines: ONNX Runtime on the CPU, against the reference implementation's trajectories."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import Golden, measure_relative_difference
from numpy.typing import NDArray

from runtime.directory.manifest import MANIFEST_FILE, read_manifest
from runtime.pipeline import Pipeline, describe_pipeline
from runtime.sampling.noise import sample_noise
from runtime.system.errors import BackendError, EngineError, FlowTurboError, NonFiniteError, RequestError

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")


@pytest.fixture(scope="module")
def pipeline(tiny_engines: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_engines, threads=1) as opened:
        yield opened


def latents(pipeline: Pipeline, classes: list[int], **options: Any) -> NDArray[np.float32]:
    noise = options.pop("noise", None)
    return pipeline.run(pipeline.request(classes, **options), noise=noise).latents


@pytest.mark.parametrize("schedule", ["H1P5R3", "H2P4R3", "H3", "P3"])
def test_latents_are_the_reference_implementations(pipeline: Pipeline, golden_s: Golden, schedule: str) -> None:
    classes = [int(label) for label in golden_s.arrays["y"]]
    guidance = float(golden_s.arrays["cfg_scale"])
    found = latents(pipeline, classes, schedule=schedule, guidance=guidance, noise=golden_s.arrays["x"])
    assert measure_relative_difference(found, golden_s.arrays[f"traj/{schedule}"][-1]) < 1e-4


@pytest.mark.parametrize(("solver", "key"), [("euler", "ode/euler/11"), ("heun", "ode/heun2/11")])
def test_solvers_are_the_reference_implementations(pipeline: Pipeline, golden_s: Golden, solver: str, key: str) -> None:
    classes = [int(label) for label in golden_s.arrays["y"]]
    guidance = float(golden_s.arrays["cfg_scale"])
    found = latents(pipeline, classes, solver=solver, steps=10, guidance=guidance, noise=golden_s.arrays["x"])
    assert measure_relative_difference(found, golden_s.arrays[key]) < 1e-4


def test_one_engine_call_per_evaluation(pipeline: Pipeline) -> None:
    result = pipeline.run(pipeline.request([1, 2], schedule="H1P5R3"))
    calls = result.usage.calls
    assert (calls["predictor"], calls["refiner"], calls["decoder"]) == (7, 6, 1)
    assert set(result.usage.seconds) == {"conditioning", "predictor", "refiner", "decoder"}


def test_more_images_than_a_batch_are_split(pipeline: Pipeline) -> None:
    request = pipeline.request([0, 1, 2, 3, 4, 5, 6], seeds=range(7), schedule="H2")
    result = pipeline.run(request)
    assert pipeline.manifest.max_batch == 3
    assert result.usage.calls["predictor"] == 3 * 4  # batches of 3, 3 and 1
    assert result.latents.shape == (7, 4, 16, 16)
    assert result.images is not None
    assert result.images.shape == (7, 32, 32, 3)
    assert result.images.dtype == np.uint8


def test_an_image_depends_on_its_seed_alone(pipeline: Pipeline) -> None:
    """Alone, in a full batch, or behind others: the same to float32 rounding, and the same to the byte on repetition."""
    together = latents(pipeline, [3, 4, 5, 6], seeds=[10, 11, 12, 13], guidance=[4.0, 1.0, 2.0, 4.0])
    for i, (label, seed, scale) in enumerate([(3, 10, 4.0), (4, 11, 1.0), (5, 12, 2.0), (6, 13, 4.0)]):
        alone = latents(pipeline, [label], seeds=[seed], guidance=scale)
        assert measure_relative_difference(together[i], alone[0]) < 1e-5
        np.testing.assert_array_equal(alone, latents(pipeline, [label], seeds=[seed], guidance=scale))


def test_noise_is_the_seeds(pipeline: Pipeline) -> None:
    by_seed = latents(pipeline, [1, 2], seeds=[5, 9], schedule="H1")
    by_noise = latents(pipeline, [1, 2], schedule="H1", noise=sample_noise([5, 9], (4, 16, 16)))
    np.testing.assert_array_equal(by_seed, by_noise)


def test_every_image_has_its_own_guidance(pipeline: Pipeline) -> None:
    mixed = latents(pipeline, [1, 1, 1], seeds=[0, 0, 0], guidance=[1.0, 2.0, 4.0], schedule="H2")
    for i, scale in enumerate([1.0, 2.0, 4.0]):
        assert (
            measure_relative_difference(mixed[i], latents(pipeline, [1], seeds=[0], guidance=scale, schedule="H2")[0])
            < 1e-5
        )
    assert measure_relative_difference(mixed[1], mixed[2]) > 1e-3


def test_defaults_come_from_the_directory(pipeline: Pipeline) -> None:
    defaults = pipeline.manifest.defaults
    request = pipeline.request([1])
    assert request.sampler.name == defaults.schedule == "H1P5R3"
    assert request.scales == (defaults.guidance,)
    assert request.vae == defaults.vae == "small"
    assert request.seeds == (0,)
    assert pipeline.request([1], solver="flowturbo").sampler.name == defaults.schedule
    assert pipeline.request(1).labels == (1,)


def test_generate_gives_pictures(pipeline: Pipeline) -> None:
    heard: list[dict[str, Any]] = []
    images = pipeline.generate([1, "class 2"], seeds=[3, 4], schedule="H2P1", guidance=2.0, callback=heard.append)
    assert images.shape == (2, 32, 32, 3)
    assert images.dtype == np.uint8
    assert len(heard) == 5
    result = pipeline.run(pipeline.request([1, 2], seeds=[3, 4], schedule="H2P1", guidance=2.0))
    np.testing.assert_array_equal(images, result.images)
    np.testing.assert_array_equal(images, pipeline.decode(result.latents))


def test_decoding_is_split_too(pipeline: Pipeline) -> None:
    sampled = sample_noise(range(5), (4, 16, 16))
    images = pipeline.decode(sampled)
    assert images.shape == (5, 32, 32, 3)
    np.testing.assert_array_equal(images[4:], pipeline.decode(sampled[4:]))


def test_a_decoder_that_overflows_is_said(pipeline: Pipeline) -> None:
    broken = sample_noise([0, 1], (4, 16, 16))
    broken[1] = np.nan
    with pytest.raises(NonFiniteError) as caught:
        pipeline.decode(broken)
    assert "1 of 2 pictures would be black" in caught.value.given
    assert "fp32" in caught.value.remedy


def test_a_network_that_overflows_is_said(pipeline: Pipeline) -> None:
    huge = np.full((1, 4, 16, 16), 3e38, np.float32)
    with pytest.raises(NonFiniteError, match="evaluation 1 of 4"):
        latents(pipeline, [1], schedule="H2", noise=huge)


def test_a_closed_pipeline_says_so(tiny_engines: Path) -> None:
    with Pipeline.load(tiny_engines, threads=1) as opened:
        request = opened.request([1], schedule="H1")
    for use in (
        lambda: opened.run(request),
        lambda: opened.generate([1]),
        lambda: opened.decode(np.zeros((1, 4, 16, 16), np.float32)),
    ):
        with pytest.raises(EngineError, match="closed"):
            use()
    opened.close()


def test_what_runs_is_said(pipeline: Pipeline) -> None:
    said = describe_pipeline(pipeline)
    assert (said["backend"], said["provider"], said["precision"], said["target"]) == (
        "onnxruntime",
        "CPUExecutionProvider",
        "fp32",
        "cpu",
    )
    assert said["chosen"] == "the only one built"
    assert "onnxruntime" in said["versions"]


def test_a_fallback_happens_only_when_it_was_allowed_and_is_said(tiny_engines: Path) -> None:
    with pytest.raises(BackendError):
        Pipeline.load(tiny_engines, provider="cuda")
    with Pipeline.load(tiny_engines, provider="cuda", allow_fallback=True, threads=1) as opened:
        said = describe_pipeline(opened)
        assert (said["provider"], said["device"]) == ("CPUExecutionProvider", "cpu, 1 threads")
        assert "CUDAExecutionProvider was asked for, CPUExecutionProvider runs" in said["notes"][0]
        assert opened.generate([1], schedule="H1").shape == (1, 32, 32, 3)


def test_the_fake_device_runs_any_directory(tiny_engines: Path) -> None:
    with Pipeline.load(tiny_engines, backend="fake") as opened:
        assert describe_pipeline(opened)["provider"] == "NumPy formula, not the engines"
        images = opened.generate([1, 2], schedule="H4", guidance=1.0)
    assert images.shape == (2, 32, 32, 3)


def test_a_directory_without_decoder_and_refiner(tiny_engines: Path, tmp_path: Path) -> None:
    copy = without(tiny_engines, tmp_path, decoder=True, refiner=True)
    with Pipeline.load(copy, threads=1) as opened:
        assert opened.request([1]).sampler.name == "searched-8"
        result = opened.run(opened.request([1], solver="euler", steps=2))
        assert result.images is None
        assert result.latents.shape == (1, 4, 16, 16)
        for use in (lambda: opened.generate([1], schedule="H1"), lambda: opened.decode(result.latents)):
            with pytest.raises(RequestError) as caught:
                use()
            assert "decoder" in caught.value.given or "vae none" in caught.value.given
        with pytest.raises(RequestError) as caught:
            opened.request([1], schedule="H1P5R3")
        assert "needs a refiner" in caught.value.given
        assert "--refiner FILE" in caught.value.remedy
        with pytest.raises(RequestError) as caught:
            opened.request([1], solver="flowturbo")
        assert "--schedule" in caught.value.remedy
        with pytest.raises(RequestError, match="vae none"):
            opened.request([1], vae="ema")


def without(source: Path, folder: Path, *, decoder: bool = False, refiner: bool = False) -> Path:
    """A copy of a directory as it would have been built with fewer parts."""
    copy = folder / "less"
    shutil.copytree(source, copy)
    data = json.loads((copy / MANIFEST_FILE).read_text(encoding="utf-8"))
    gone = ("decoder",) * decoder + ("refiner",) * refiner
    for kind in ("engines", "graphs"):
        data[kind] = [record for record in data[kind] if not record["graph"].startswith(gone)]
    if decoder:
        data["vaes"] = {}
        data["defaults"]["vae"] = None
    if refiner:
        data["model"]["refiner"] = None
        data["defaults"] |= {"schedule": None, "solver": "searched", "steps": 8}
    (copy / MANIFEST_FILE).write_text(json.dumps(data), encoding="utf-8")
    return copy


BAD_REQUESTS: list[tuple[dict[str, Any], str, str]] = [
    ({"classes": []}, "no class", "at least one"),
    ({"classes": [10]}, "class 10", "0 class 0"),
    ({"classes": [-1]}, "class -1", "0 class 0"),
    ({"classes": ["dog"]}, "class 'dog'", "0 class 0"),
    ({"classes": ["class"]}, "could be", "index"),
    ({"classes": [""]}, "class ''", "0 class 0"),
    ({"classes": ["²"]}, "class '²'", "0 class 0"),
    ({"classes": ["--5"]}, "class '--5'", "0 class 0"),
    ({"seeds": [0, 1]}, "2 seeds", "as many of each"),
    ({"seeds": [-1]}, "seed -1", "0 to 2^63"),
    ({"seeds": [2**63]}, "seed 9223372036854775808", "0 to 2^63"),
    ({"guidance": [1.0, 2.0]}, "2 guidance scales", "as many of each"),
    ({"guidance": float("nan")}, "guidance nan", "0 to 100"),
    ({"guidance": -1}, "guidance -1", "0 to 100"),
    ({"guidance": 1e9}, "guidance 1e+09", "0 to 100"),
    ({"schedule": "H1Q2"}, "H1Q2", "H1P5R3"),
    ({"schedule": "H2", "solver": "euler"}, "euler", "not both"),
    ({"solver": "warp-drive"}, "warp-drive", "euler"),
    ({"solver": "searched", "steps": 3}, "3 steps", "5 to 10"),
    ({"solver": "euler", "steps": 0}, "0 steps", "1 to 1000"),
    ({"solver": "flowturbo", "steps": 4}, "4 steps without a solver", "--solver heun --steps 4"),
    ({"steps": 6}, "6 steps without a solver", "a schedule with 6 blocks"),
    ({"schedule": "H2", "steps": 4}, "--steps is 4", "--steps out"),
    ({"vae": "mse"}, "mse", "small"),
]


@pytest.mark.parametrize(
    ("change", "given", "advice"), BAD_REQUESTS, ids=[str(change) for change, _, _ in BAD_REQUESTS]
)
def test_impossible_requests_say_what_is_possible(
    pipeline: Pipeline, change: dict[str, Any], given: str, advice: str
) -> None:
    with pytest.raises(RequestError) as caught:
        pipeline.request(**({"classes": [1]} | change))
    assert given in caught.value.given
    assert advice in caught.value.allowed + caught.value.remedy


@pytest.mark.parametrize(
    "noise",
    [np.zeros((2, 4, 16, 16), np.float32), np.zeros((1, 4, 8, 8), np.float32), np.zeros((4, 16, 16), np.float32), np.zeros((1, 4, 16, 16)),
     np.full((1, 4, 16, 16), np.nan, np.float32), np.zeros((1, 4, 16, 16), ">f4"), np.zeros((1, 4, 16, 16), "U1")],
    ids=["images", "side", "axes", "float64", "nan", "byte order", "text"],
)  # fmt: skip
def test_noise_must_fit_the_request(pipeline: Pipeline, noise: NDArray[Any]) -> None:
    with pytest.raises(RequestError) as caught:
        latents(pipeline, [1], noise=noise)
    assert str(list(noise.shape)) in caught.value.given
    assert "float32 of shape [1, 4, 16, 16]" in caught.value.allowed


BAD_LOADS: list[tuple[dict[str, Any], type[FlowTurboError], str, str]] = [
    ({"resolution": 64}, RequestError, "resolution 64", "--resolution 64"),
    ({"threads": 0}, RequestError, "0 threads", "1 to 1024"),
    ({"threads": "2"}, RequestError, "'2' threads", "1 to 1024"),
    ({"threads": True}, RequestError, "True threads", "1 to 1024"),
    ({"threads": 1.5}, RequestError, "1.5 threads", "1 to 1024"),
    ({"backend": ["cpu"]}, RequestError, "backend ['cpu']", "a name"),
    ({"provider": 3}, RequestError, "provider 3", "a name"),
    ({"backend": "abacus"}, BackendError, "abacus", "onnxruntime"),
    ({"provider": "abacus"}, BackendError, "abacus", "openvino"),
    ({"backend": "fake", "provider": "cpu"}, BackendError, "provider cpu", "onnxruntime's"),
    ({"backend": "tensorrt"}, BackendError, "tensorrt was asked for", "doctor"),
    ({"backend": "rtx", "provider": "cpu"}, BackendError, "provider cpu", "onnxruntime's"),
    ({"provider": "cuda"}, BackendError, "CUDAExecutionProvider", "flowturbo[cuda]"),
]


@pytest.mark.parametrize(
    ("options", "kind", "given", "advice"), BAD_LOADS, ids=[str(options) for options, *_ in BAD_LOADS]
)
def test_what_cannot_be_opened_says_why(
    tiny_engines: Path, options: dict[str, Any], kind: type[FlowTurboError], given: str, advice: str
) -> None:
    with pytest.raises(kind) as caught:
        Pipeline.load(tiny_engines, **options)
    assert given in caught.value.given
    assert advice in caught.value.allowed + caught.value.remedy


@pytest.mark.parametrize("graph", ["predictor", "refiner", "conditioning"])
def test_a_flipped_byte_is_found(tiny_engines: Path, tmp_path: Path, graph: str) -> None:
    copy = tmp_path / "engines"
    shutil.copytree(tiny_engines, copy)
    record = read_manifest(copy).find_engine(graph, 32, "cpu")
    assert record is not None
    flip(copy / record.path)
    with pytest.raises(EngineError) as caught:
        Pipeline.load(copy)
    assert record.path in caught.value.given
    assert "altered or damaged" in caught.value.given
    assert str(copy) in caught.value.remedy


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_moved_directory_runs(tiny_engines: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a folder with spaces" / "engines"
    shutil.copytree(tiny_engines, moved)
    with Pipeline.load(moved, threads=1) as opened:
        assert opened.generate([1], schedule="H1").shape == (1, 32, 32, 3)


def test_openvino_runs_in_the_precision_that_was_built(openvino_engines: Path, golden_nosigma: Golden) -> None:
    """OpenVINO drops to bf16 on AMX by itself; a directory in fp32 must not."""
    with Pipeline.load(openvino_engines, threads=1) as opened:
        assert (opened.ran.provider, opened.precision) == ("OpenVINOExecutionProvider", "fp32")
        request = opened.request([int(y) for y in golden_nosigma.arrays["y"]], solver="heun", steps=10, guidance=1.5)
        found = opened.run(request, noise=golden_nosigma.arrays["x"]).latents
    assert measure_relative_difference(found, golden_nosigma.arrays["ode/heun2/11"]) < 1e-4


def test_cpu_runs_a_directory_for_openvino_in_fp32(openvino_engines: Path, golden_nosigma: Golden) -> None:
    with Pipeline.load(openvino_engines, provider="cpu", threads=1) as opened:
        assert opened.ran.provider == "CPUExecutionProvider"
        request = opened.request([int(y) for y in golden_nosigma.arrays["y"]], schedule="H2", guidance=1.5)
        assert opened.run(request, noise=golden_nosigma.arrays["x"]).images is None


def test_threads_that_share_a_pipeline_take_turns(pipeline: Pipeline) -> None:
    alone = {seed: latents(pipeline, [1], seeds=[seed], schedule="H2P2") for seed in range(6)}
    with ThreadPoolExecutor(3) as pool:
        shared = list(pool.map(lambda seed: latents(pipeline, [1], seeds=[seed], schedule="H2P2"), range(6)))
    for seed, found in enumerate(shared):
        np.testing.assert_array_equal(found, alone[seed])


def test_guidance_on_all_channels_moves_the_fourth(pipeline: Pipeline) -> None:
    three = latents(pipeline, [1], schedule="H1", guidance=4.0)
    four = latents(pipeline, [1], schedule="H1", guidance=4.0, guidance_channels=4)
    none = latents(pipeline, [1], schedule="H1", guidance=1.0)
    assert not np.array_equal(three, four)
    assert not np.array_equal(four, none)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({"seeds": [5.5]}, "seed 5.5"),
        ({"seeds": ["5"]}, "seed '5'"),
        ({"guidance": "2"}, "guidance '2'"),
        ({"guidance": [None]}, "guidance None"),
        ({"solver": "heun", "steps": 1.5}, "steps 1.5"),
    ],
)
def test_values_of_another_kind_are_named(pipeline: Pipeline, asked: dict[str, Any], given: str) -> None:
    with pytest.raises(RequestError) as caught:
        pipeline.request([1], **asked)
    assert given in caught.value.given


def test_numpy_values_are_taken(pipeline: Pipeline) -> None:
    request = pipeline.request(np.array([1, 2]), seeds=np.array([3, 4]), guidance=np.float32(2))
    assert (request.labels, request.seeds, request.scales) == ((1, 2), (3, 4), (2.0, 2.0))
    assert pipeline.request(np.int64(1)).labels == (1,)


def test_closing_twice_is_closing_once(tiny_engines: Path) -> None:
    with Pipeline.load(tiny_engines, provider="cpu") as opened:
        opened.close()
    opened.close()


def test_a_copy_loads_the_engines_again(tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled and copied pipelines make the same pictures, wherever the working folder is."""
    monkeypatch.chdir(tiny_engines.parent)
    with Pipeline.load(tiny_engines.name, threads=1, decode_tile=None) as original:
        expected = original.generate([1], seeds=[3])
        pickled = pickle.dumps(original)
        monkeypatch.chdir(tmp_path)
        for load in (lambda: pickle.loads(pickled), lambda: copy.copy(original), lambda: copy.deepcopy(original)):
            with load() as other:
                assert other is not original
                assert (other.resolution, other.choice, other.manifest) == (
                    original.resolution,
                    original.choice,
                    original.manifest,
                )
                np.testing.assert_array_equal(other.generate([1], seeds=[3]), expected)
        np.testing.assert_array_equal(original.generate([1], seeds=[3]), expected)  # closing the copies left it open
    with pytest.raises(EngineError, match="was closed"):
        pickle.dumps(original)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_child_forked_while_a_thread_generates_does_not_hang(tiny_engines: Path) -> None:
    code = f"""
import os, threading
from flowturbo import Pipeline, FlowTurboError
pipeline = Pipeline.load({str(tiny_engines)!r}, threads=1)
other = Pipeline.load({str(tiny_engines)!r}, threads=1)
is_in_batch, may_go_on = threading.Event(), threading.Event()
def hold(event):
    is_in_batch.set()
    may_go_on.wait(60)
thread = threading.Thread(target=lambda: pipeline.generate([1], callback=hold))
thread.start()
is_in_batch.wait(60)
child = os.fork()
if not child:
    try:
        pipeline.generate([1])
    except FlowTurboError as error:
        print(error, flush=True)
        other.generate([1])  # which no thread held
        pipeline.close()
        os._exit(7)
    os._exit(1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
may_go_on.set()
thread.join()
pipeline.generate([1])
print("child", status)
"""
    words = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    assert "was forked while another thread was generating" in run.stdout, run.stdout + run.stderr
    assert "Do: load the pipeline in the child" in run.stdout
    assert run.stdout.endswith("child 7\n")


def test_a_sampler_that_diverges_is_said(tiny_engines: Path) -> None:
    """A flat picture with exit code 0 would be taken for what the model makes."""
    with Pipeline.load(tiny_engines, provider="cpu", threads=1) as pipeline:
        request = pipeline.request([1, 2], solver="euler", steps=2)
        noise = np.random.default_rng(0).standard_normal((2, *pipeline._latent_shape), dtype=np.float32)
        noise[1] *= np.float32(1e6)
        with pytest.warns(UserWarning, match="the latents of image 1 have a root mean square of"):
            pipeline.run(request, noise=noise)
