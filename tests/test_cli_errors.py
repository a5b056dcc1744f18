"""Bad input through the real commands: one message that says what, what is allowed and what to do; exit 1 or 2; no rest."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from golden import load_golden_state, write_vae
from PIL import Image

from export.cli.export import main as export_main
from runtime.cli.run import main as run_main
from runtime.directory.manifest import MANIFEST_FILE, MANIFEST_SCHEMA, read_manifest

pytestmark = [
    pytest.mark.filterwarnings("ignore:refiner steps"),
    pytest.mark.filterwarnings(
        "ignore:The `local_dir_use_symlinks` argument"
    ),  # diffusers' own, on the way to a download
]
COMMANDS: dict[str, click.Command] = {"run": run_main, "export": export_main}
USAGE = 2
Prepare = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        words: the command line; {engines}, {nosigma}, {checkpoints}, {vae} and {tmp} are filled in.
        says: what stderr must hold.
        code: exit status.
        prepare: makes what the command line names, in {tmp}; {tmp}/engines is a copy of the engine directory.
    """

    name: str
    words: str
    says: tuple[str, ...]
    code: int = 1
    prepare: Prepare = lambda tmp: None

    def __str__(self) -> str:
        return self.name


def edit_manifest(how: Callable[[dict[str, Any]], None]) -> Prepare:
    def prepare(tmp: Path) -> None:
        path = tmp / "engines" / MANIFEST_FILE
        data = json.loads(path.read_text(encoding="utf-8"))
        how(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return prepare


def edit_bytes(name: str, how: Callable[[bytes], bytes]) -> Prepare:
    def prepare(tmp: Path) -> None:
        path = tmp / "engines" / name
        path.write_bytes(how(path.read_bytes()))

    return prepare


def write(name: str, content: Any) -> Prepare:
    """Text, bytes, a NumPy array or a state dict as a file."""

    def prepare(tmp: Path) -> None:
        path = tmp / name
        if isinstance(content, str | bytes):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        elif isinstance(content, np.ndarray):
            np.save(path, content, allow_pickle=True)
        else:
            torch.save(content, path)

    return prepare


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def remove(name: str) -> Prepare:
    return lambda tmp: (tmp / name).unlink()


def with_nan(tmp: Path) -> None:
    state = load_golden_state("golden_s", "predictor")
    state["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    torch.save(state, tmp / "nan.pt")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/executed-by-a-checkpoint",)


def archive(tmp: Path) -> None:
    np.savez(tmp / "noise.npz", a=np.zeros(3))


def cut(tmp: Path) -> None:
    np.save(tmp / "whole.npy", np.zeros((1, 4, 16, 16), np.float32))
    (tmp / "noise.npy").write_bytes((tmp / "whole.npy").read_bytes()[:-100])


def claims_too_much(tmp: Path) -> None:
    """A header of 4 exabytes over nothing."""
    np.save(tmp / "noise.npy", np.zeros((1, 4), np.float32))
    content = (tmp / "noise.npy").read_bytes()
    (tmp / "noise.npy").write_bytes(content.replace(b"(1, 4), }" + b" " * 18, b"(1000000000, 1000000000), }"))


ENGINE = "32/fp32/predictor.onnx"
RUN = "run --engine {engines} --class 1 --out {tmp}/out"
COPY = "run --engine {tmp}/engines --class 1 --out {tmp}/out"
NOISE = f"{RUN} --noise {{tmp}}/noise.npy"
GOLDEN_AT = "export build-engines --predictor {checkpoints}/golden_s-predictor.pt --target cpu --out"
BUILD = "export build-engines --target cpu --out {tmp}/out"
GOLDEN = f"{BUILD} --predictor {{checkpoints}}/golden_s-predictor.pt"

CASES = [
    # Requests
    Case("class number", "run --engine {engines} --class 207 --out {tmp}/out", ("class 207", "Allowed: 0 class 0, 1 class 1")),
    Case("class below zero", "run --engine {engines} --class=-3 --out {tmp}/out", ("class -3", "Allowed: 0 class 0")),
    Case("class name", "run --engine {engines} --class dachshund --out {tmp}/out", ("class 'dachshund'", "Allowed: 0 class 0")),
    Case("class mistyped", "run --engine {engines} --class clas3 --out {tmp}/out", ("did you mean 'class 3'?",)),
    Case("class ambiguous", "run --engine {engines} --class class --out {tmp}/out", ("could be 0 class 0", "Do: name it by its index")),
    Case("class of a thousand", "run --engine {nosigma} --class zebrra --out {tmp}/out", ("did you mean 'zebra'?", "and 980 more")),
    Case("no class", "run --engine {engines} --out {tmp}/out", ("--class",), USAGE),
    Case("schedule", f"{RUN} --schedule H1X3", ("schedule 'H1X3'", "Allowed: blocks H (Heun)", "H1P5R3")),
    Case("schedule without count", f"{RUN} --schedule HP5", ("schedule 'HP5'", "Allowed: blocks H (Heun)")),
    Case("schedule of no step", f"{RUN} --schedule H0", ("0 steps", "1 to 1000")),
    Case("refiner first", f"{RUN} --schedule R3", ("needs a velocity", "Do: put H or P first")),
    Case("refiner before predictor", f"{RUN} --schedule H1R2P3", ("FID 14 to 31", "all R blocks last", "--force")),
    Case("refiner that is not there", "run --engine {nosigma} --class 1 --schedule H1R2 --out {tmp}/out",
         ("H1R2 needs a refiner", "Allowed: schedules of H and P", "Do: rebuild with --refiner")),
    Case("schedule and solver", f"{RUN} --schedule H1P5R3 --solver euler", ("schedule 'H1P5R3' and solver 'euler'", "not both")),
    Case("schedule and steps", f"{RUN} --schedule H1P5R3 --steps 4", ("--steps is 4", "Do: leave --steps out")),
    Case("steps of no solver", f"{RUN} --steps 4", ("4 steps without a solver", "Do: name a solver")),
    Case("flowturbo steps", f"{RUN} --solver flowturbo --steps 4", ("4 steps without a solver", "Do: name a solver")),
    Case("solver", f"{RUN} --solver rk45", ("rk45", "euler"), USAGE),
    Case("no steps", f"{RUN} --solver euler --steps 0", ("--steps", "1<=x<=1000"), USAGE),
    Case("too many steps", f"{RUN} --solver euler --steps 1001", ("--steps", "1<=x<=1000"), USAGE),
    Case("searched steps", f"{RUN} --solver searched --steps 30", ("searched solver with 30 steps", "Allowed: 5 to 10")),
    Case("guidance nan", f"{RUN} --guidance nan", ("guidance nan", "Allowed: a number from 0 to 100")),
    Case("guidance negative", f"{RUN} --guidance -4", ("guidance -4", "Allowed: a number from 0 to 100")),
    Case("guidance huge", f"{RUN} --guidance 1e9", ("guidance 1e+09", "Allowed: a number from 0 to 100")),
    Case("guidance text", f"{RUN} --guidance strong", ("--guidance", "strong")),
    Case("number of images", f"{RUN} --num 0", ("--num",), USAGE),
    Case("seed", f"{RUN} --seed -1", ("--seed",), USAGE),
    Case("threads", f"{RUN} --threads 0", ("--threads",), USAGE),
    Case("unknown option", f"{RUN} --turbo", ("--turbo",), USAGE),
    Case("resolution not built", f"{RUN} --resolution 512", ("resolution 512", "Allowed: 32", "Do: build it: flowturbo-export")),
    Case("unknown VAE", f"{RUN} --vae mse", ("VAE 'mse'", "Allowed: small")),
    Case("VAE of latents only", "run --engine {nosigma} --class 1 --vae ema --out {tmp}/out", ("VAE 'ema'", "--vae none")),
    # Backends
    Case("backend", f"{RUN} --backend abacus", ("abacus", "onnxruntime"), USAGE),
    Case("provider", f"{RUN} --provider abacus", ("abacus", "openvino"), USAGE),
    Case("provider not installed", f"{RUN} --provider cuda", ("CUDAExecutionProvider", "Do: pip install 'flowturbo[cuda]'", "doctor")),
    Case("backend without engines", f"{RUN} --backend tensorrt", ("tensorrt was asked for", "Do: ")),
    Case("provider of another backend", f"{RUN} --backend fake --provider cpu", ("provider cpu", "Do: providers are onnxruntime's")),
    # Engine directories
    Case("no directory", "run --engine {tmp}/nowhere --class 1 --out {tmp}/out",
         ("no engine directory", "Do: build it: flowturbo-export build-engines")),
    Case("a file as directory", "run --engine {vae}/config.json --class 1 --out {tmp}/out", ("no engine directory", "Do: ")),
    Case("directory without manifest", "run --engine {vae} --class 1 --out {tmp}/out", ("has no manifest.json", "Do: ")),
    Case("cut manifest", COPY, ("manifest.json is damaged", "Do: "), prepare=edit_bytes(MANIFEST_FILE, lambda b: b[: len(b) // 2])),
    Case("empty manifest", COPY, ("manifest.json is damaged", "Do: "), prepare=edit_bytes(MANIFEST_FILE, lambda b: b"")),
    Case("manifest of another program", COPY, ("damaged", "Do: "), prepare=edit_bytes(MANIFEST_FILE, lambda b: b'{"name": "page"}')),
    Case("manifest from the future", COPY, (f"schema {MANIFEST_SCHEMA + 1}", "newer flowturbo", f"Allowed: schema up to {MANIFEST_SCHEMA}", "Do: pip"),
         prepare=edit_manifest(lambda data: data.update(schema=MANIFEST_SCHEMA + 1))),
    Case("manifest with an unknown key", COPY, ("unknown keys: colour",), prepare=edit_manifest(lambda data: data.update(colour=1))),
    Case("manifest that names a file outside", COPY, ("outside", "../secret"),
         prepare=edit_manifest(lambda data: data["files"][0].update(path="../secret"))),
    Case("flipped byte", COPY, ("was altered or damaged", ENGINE, "Do: copy the directory again"), prepare=edit_bytes(ENGINE, flip)),
    Case("cut file", COPY, ("bytes, the manifest says", ENGINE, "Do: "), prepare=edit_bytes(ENGINE, lambda b: b[:-1])),
    Case("missing file", COPY, (f"{ENGINE} is missing", "Do: "), prepare=remove(f"engines/{ENGINE}")),
    Case("flipped byte of the proof", "export verify {tmp}/engines", ("was altered", "Do: "), prepare=edit_bytes("proof.npz", flip)),
    Case("verify nothing", "export verify {tmp}/nowhere", ("no engine directory", "Do: ")),
    Case("inspect a cut manifest", "export inspect {tmp}/engines", ("damaged", "Do: "), prepare=edit_bytes(MANIFEST_FILE, lambda b: b[:100])),
    # Noise
    Case("no noise file", NOISE, ("cannot be read", "Allowed: a .npy file")),
    Case("noise shape", NOISE, ("noise of shape [2, 4, 16, 16]", "float32 of shape [1, 4, 16, 16]"),
         prepare=write("noise.npy", np.zeros((2, 4, 16, 16), np.float32))),
    Case("noise type", NOISE, ("float64", "Allowed: finite float32"), prepare=write("noise.npy", np.zeros((1, 4, 16, 16)))),
    Case("noise with nan", NOISE, ("noise", "finite"), prepare=write("noise.npy", np.full((1, 4, 16, 16), np.nan, np.float32))),
    Case("noise of objects", NOISE, ("cannot be read", "Allowed: a .npy file"), prepare=write("noise.npy", np.array([{}, None]))),
    Case("pickle as noise", NOISE, ("cannot be read",), prepare=write("noise.npy", pickle.dumps(Malicious()))),
    Case("text as noise", NOISE, ("cannot be read", "Allowed: a .npy file"), prepare=write("noise.npy", "1 2 3")),
    Case("empty noise", NOISE, ("cannot be read", "Allowed: a .npy file"), prepare=write("noise.npy", b"")),
    Case("cut noise", NOISE, ("cannot be read", "Allowed: a .npy file"), prepare=cut),
    Case("noise larger than any memory", NOISE, ("cannot be read", "Allowed: a .npy file"), prepare=claims_too_much),
    Case("broken archive as noise", NOISE, ("cannot be read", "Allowed: a .npy file"), prepare=write("noise.npy", b"PK\x03\x04 cut")),
    Case("archive as noise", f"{RUN} --noise {{tmp}}/noise.npz", ("cannot be read", "Allowed: a .npy file of one"), prepare=archive),
    Case("folder as noise", f"{RUN} --noise {{tmp}}", ("cannot be read", "Allowed: a .npy file")),
    Case("a network that overflows", NOISE, ("NaN or infinity at evaluation 1", "Do: build this network in a wider precision"),
         prepare=write("noise.npy", np.full((1, 4, 16, 16), 3e38, np.float32))),
    # Output
    Case("a file in the place of --out", "run --engine {engines} --class 1 --out {tmp}/out", ("cannot make the folder", "Do: "),
         prepare=write("out", "a file")),
    Case("--out below a file", "run --engine {engines} --class 1 --out {tmp}/file/out", ("cannot make the folder", "Do: "),
         prepare=write("file", "a file")),
    Case("--out that cannot be written", "run --engine {engines} --class 1 --out /proc/flowturbo", ("/proc/flowturbo", "Do: ")),
    Case("--save-latents is a folder", f"{RUN} --save-latents {{tmp}}/engines", ("cannot write", "Do: ")),
    Case("--save-latents is this folder", f"{RUN} --save-latents .", ("cannot write", "Do: ")),
    # Builds
    Case("no checkpoint", f"{BUILD} --predictor {{tmp}}/no.pt", ("no predictor checkpoint", "Do: check the path")),
    Case("folder as checkpoint", f"{BUILD} --predictor {{vae}}", ("no predictor checkpoint", "Do: ")),
    Case("no refiner", f"{GOLDEN} --refiner {{tmp}}/no.pt", ("no refiner checkpoint", "Do: check the path")),
    Case("text as checkpoint", f"{BUILD} --predictor {{tmp}}/a.pt --vae none", ("is not a checkpoint", "Allowed: a PyTorch", "Do: "),
         prepare=write("a.pt", "These are not the weights you are looking for.\n")),
    Case("safetensors that is text", f"{BUILD} --predictor {{tmp}}/a.safetensors --vae none", ("is not a checkpoint", "Do: "),
         prepare=write("a.safetensors", "no weights")),
    Case("cut checkpoint", f"{BUILD} --predictor {{tmp}}/a.pt --vae none", ("cut short", "Do: download or copy it again"),
         prepare=write("a.pt", b"PK\x03\x04" + bytes(500))),
    Case("checkpoint with code in it", f"{BUILD} --predictor {{tmp}}/a.pt --vae none", ("could run code", "Allowed: tensors", "Do: "),
         prepare=write("a.pt", {"model": Malicious()})),
    Case("checkpoint of something else", f"{BUILD} --predictor {{tmp}}/a.pt --vae none", ("is not a SiT", "Allowed: a SiT"),
         prepare=write("a.pt", {"conv.weight": torch.zeros(2)})),
    Case("checkpoint with NaN", f"{BUILD} --predictor {{tmp}}/nan.pt --heads 6 --vae none",
         ("NaN", "blocks.0.mlp.fc1.weight", "Do: "), prepare=with_nan),
    Case("refiner as predictor", f"{BUILD} --predictor {{checkpoints}}/golden_s-refiner.pt --heads 6 --vae none",
         ("is a refiner", "Do: name a predictor here")),
    Case("predictor as refiner", f"{GOLDEN} --refiner {{checkpoints}}/golden_s-predictor.pt --heads 6 --vae none",
         ("is a predictor", "Do: name a refiner here")),
    Case("refiner of another model", f"{GOLDEN} --refiner {{checkpoints}}/golden_nosigma-refiner.pt --heads 2 --vae none",
         ("the refiner has classes 1000, the predictor 10", "Do: name the refiner")),
    Case("refiner alone", f"{BUILD} --refiner {{checkpoints}}/golden_s-refiner.pt", ("--refiner without --predictor", "Do: ")),
    Case("heads not named", f"{GOLDEN} --vae none", ("heads", "width 96", "Do: name them: --heads N")),
    Case("heads that do not divide", f"{GOLDEN} --vae none --heads 7", ("7 does not divide", "Do: ")),
    Case("no heads", f"{GOLDEN} --vae none --heads 0", ("0 heads", "Allowed: ")),
    Case("int8 alone", f"{GOLDEN} --heads 6 --precision int8", ("int8 without a calibration", "Do: measure one")),
    Case("int8 from nowhere", f"{GOLDEN} --heads 6 --precision int8 --calibration x.npz", ("no calibration at x.npz", "Do: ")),
    Case("int8 on rtx", f"{GOLDEN} --precision int8 --target rtx", ("weights only", "Allowed: fp32, fp16", "Do: ")),
    Case("choice", f"{GOLDEN} --heads 6 --choice x.json", ("--choice with precision fp32", "Allowed: --precision int8 or fp16", "Do: ")),
    Case("calibration", f"{GOLDEN} --heads 6 --calibration x.json", ("--calibration with precision fp32", "Allowed: --precision int8", "Do: ")),
    Case("fp16 on a CPU", f"{GOLDEN} --heads 6 --precision fp16", ("fp16 for target cpu", "Allowed: fp32, int8, int8-weights, int4-weights for cpu", "Do: ")),
    Case("precision", f"{GOLDEN} --precision fp8", ("fp8",), USAGE),
    Case("target", "export build-engines --target toaster", ("toaster",), USAGE),
    Case("no batch", f"{GOLDEN} --max-batch 0", ("--max-batch",), USAGE),
    Case("batch too large", f"{GOLDEN} --max-batch 1000", ("--max-batch",), USAGE),
    Case("resolution too small", f"{GOLDEN} --resolution 0", ("resolution 0", "Allowed: 8 to")),
    Case("resolution between patches", f"{GOLDEN} --heads 6 --vae {{vae}} --resolution 33", ("resolution 33", "multiples of 4", "32")),
    Case("VAE that is no folder", f"{GOLDEN} --heads 6 --vae ./nowhere", ("nowhere", "Allowed: ema, mse, taesd")),
    Case("VAE folder without VAE", f"{GOLDEN} --heads 6 --vae {{tmp}}/engines", ("could not be loaded", "Allowed: config.json", "Do: ")),
    Case("VAE that cannot be downloaded", f"{GOLDEN} --heads 6 --vae nobody/nothing", ("nobody/nothing", "Do: without a network")),
    Case("VAE and none", f"{GOLDEN} --vae none --vae ema", ("--vae none together with ema", "Do: ")),
    Case("VAE of other channels", f"{GOLDEN} --heads 6 --vae {{tmp}}/vae3", ("3 latent channels, the predictor 4", "Do: "),
         prepare=lambda tmp: void(write_vae(tmp / "vae3", channels=3))),
    Case("a file in the place of the engines", f"{GOLDEN} --heads 6 --vae none", ("is a file", "Do: "), prepare=write("out", "a file")),
    Case("a folder with other things", f"{GOLDEN_AT} {{checkpoints}}",
         ("other things", "Do: ")),
    Case("this folder", f"{GOLDEN_AT} .", ("error:", "Do: ")),
    Case("the root", f"{GOLDEN_AT} /", ("error:", "Do: ")),
    Case("from nothing", f"{BUILD} --from {{tmp}}/nowhere", ("no engine directory", "Do: ")),
    Case("from a directory and a checkpoint", f"{GOLDEN} --from {{engines}}", ("--from together with", "Allowed: --target", "Do: ")),
    Case("from a directory with export options", "export build-engines --from {engines} --heads 6 --target cpu",
         ("--from together with", "Allowed: --target", "Do: ")),
    Case("allow-foreign without from", f"{GOLDEN} --allow-foreign", ("--allow-foreign without --from", "Do: ")),
    Case("heads against what the file says", "export build-engines --heads 7 --vae none --target cpu --out {tmp}/out",
         ("7 heads do not divide its width", "Do: leave --heads out")),
    Case("name too long", "run --engine {engines} --class 1 --out {tmp}/" + "a" * 300, ("File name too long", "Do: shorten the name")),
    Case("engines with a name too long", "run --engine {tmp}/" + "a" * 300 + " --class 1 --out {tmp}/out", ("File name too long", "Do: ")),
    Case("build with a name too long", f"{GOLDEN_AT} {{tmp}}/" + "a" * 300, ("File name too long", "Do: ")),
    Case("noise with a name too long", f"{RUN} --noise {{tmp}}/" + "a" * 300, ("File name too long", "Allowed: ")),
    Case("saved sampler with a name too long", f"{RUN} --schedule {{tmp}}/" + "a" * 300 + ".json", ("File name too long", "Allowed: ")),
    Case("pictures into an engine directory", "run --engine {engines} --class 1 --out {engines}", ("is an engine directory", "Do: ")),
    Case("guidance channels", f"{RUN} --guidance-channels 5", ("guidance on 5 channels", "Allowed: 1 to 4")),
    Case("digits of another script", f"{RUN} --schedule H٣P2", ("schedule", "Allowed: blocks H")),
    Case("from a directory in another precision", "export build-engines --from {engines} --target cuda --precision fp16 --out {tmp}/out",
         ("needs ONNX files in fp16", "Allowed: fp32", "Do: ")),
]  # fmt: skip


def void(value: object) -> None:
    """For `prepare`s whose maker gives something."""


def invoke(words: list[str]) -> Result:
    return CliRunner().invoke(COMMANDS[words[0]], words[1:])


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_is_one_message(
    case: Case,
    tiny_engines: Path,
    nosigma_engines: Path,
    checkpoints: Path,
    vae: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "{tmp}/engines" in case.words:
        shutil.copytree(tiny_engines, tmp_path / "engines")
    case.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    places = {
        "engines": tiny_engines,
        "nosigma": nosigma_engines,
        "checkpoints": checkpoints,
        "vae": vae,
        "tmp": tmp_path,
    }
    before = snapshot(tmp_path)
    result = invoke([word.format(**places) for word in case.words.split()])
    assert isinstance(result.exception, SystemExit), f"a traceback: {result.exception!r}"
    assert result.exit_code == case.code
    for words in case.says:
        assert words in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.split("error:", 1)[-1].splitlines()) <= (12 if case.code == USAGE else 4), result.stderr
    assert snapshot(tmp_path) == before, "something was left behind"
    assert not Path("/tmp/executed-by-a-checkpoint").exists()


def test_more_kinds_of_bad_input_than_were_asked_for() -> None:
    assert len(CASES) >= 25
    assert len({case.name for case in CASES}) == len(CASES)


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: writing fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_leaves_nothing_half_written(tiny_engines: Path, tmp_path: Path) -> None:
    latents = tmp_path / "latents.npy"
    words = ["run", "--engine", tiny_engines, "--class", 1, "--num", 3, "--schedule", "H1", "--save-latents", latents]
    with small_files(8192):
        result = invoke([*map(str, words), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    assert "cannot write" in result.stderr
    assert "Do: free space" in result.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in left} <= {".png"}, "what was finished before the disk was full"
    for path in left:
        with Image.open(path) as image:
            image.load()


def test_a_build_on_a_full_disk_leaves_no_directory(checkpoints: Path, tmp_path: Path) -> None:
    predictor, out = checkpoints / "golden_nosigma-predictor.pt", tmp_path / "out"
    words = ["build-engines", "--predictor", predictor, "--heads", 4, "--vae", "none", "--target", "cpu", "--out", out]
    with small_files(30_000):
        result = invoke(["export", *map(str, words)])
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    assert "error: cannot write" in result.stderr
    assert "Do: free space" in result.stderr
    assert not out.exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".onnx", ".data")]


def test_a_cancelled_build_says_so(tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.compile.ProofRun.prove", cancel)
    result = invoke(
        ["export", "build-engines", "--from", str(tiny_engines), "--target", "cpu", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 130
    assert "cancelled" in result.stderr
    assert not (tmp_path / "out").exists()


def test_every_engine_file_is_guarded(tiny_engines: Path, tmp_path: Path) -> None:
    """One flipped byte in any file that a generation reads is found before anything runs."""
    for record in read_manifest(tiny_engines).graphs:
        folder = tmp_path / record.graph
        shutil.copytree(tiny_engines, folder)
        (folder / record.path).write_bytes(flip((folder / record.path).read_bytes()))
        result = invoke(
            ["run", "--engine", str(folder), "--class", "1", "--schedule", "H1R1", "--out", str(tmp_path / "out")]
        )
        assert result.exit_code == 1
        assert record.path in result.stderr
        assert not list((tmp_path / "out").glob("*"))
