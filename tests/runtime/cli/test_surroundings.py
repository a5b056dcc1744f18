"""flowturbo-run where things are missing or odd: no network, no home, no stderr, names that are no text, other runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
REFUSE_INTERNET = "from no_internet import refuse_internet; refuse_internet();"
MAIN = "from runtime.cli.run import main; main()"


def run(*words: object, code: str = MAIN, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own; `shell` is a redirection."""
    arguments = [sys.executable, "-c", code, *map(str, words)]
    if shell:
        arguments = ["sh", "-c", f'exec "$@" {shell}', "sh", *arguments]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    variables = {
        k: v
        for k, v in os.environ.items()
        if k not in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
    }
    variables |= {"PYTHONPATH": paths, "PYTHONUTF8": "1", **environment}
    return subprocess.run(
        arguments, env=variables, capture_output=True, text=True, errors="surrogateescape", check=False, timeout=120
    )


def test_nothing_leaves_the_machine(tiny_engines: Path, tmp_path: Path) -> None:
    """The kernel kills the process at its first internet socket; the only files are pictures and our own cache."""
    control = run(code=REFUSE_INTERNET + "import socket; socket.socket()")
    if control.returncode != -31:  # SIGSYS
        pytest.skip(f"this kernel has no filters of system calls: {control.stderr[-200:]}")
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    words = ("--engine", tiny_engines, "--class", 1, "--num", 2, "--out", out)
    result = run(*words, code=REFUSE_INTERNET + MAIN, HOME=str(home))
    assert result.returncode == 0, result.stderr
    written = {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()}
    assert written == {(".cache", "flowturbo")}, "ONNX Runtime's telemetry keeps a device id beside it"
    assert sorted(os.listdir(tmp_path)) == ["home", "out"]


@pytest.mark.parametrize("module", ["runtime.pipeline", "flowturbo", "export.cli.export", "calibration.cli.calibrate"])
def test_telemetry_is_off_before_any_backend_is_imported(module: str) -> None:
    code = f"import os, {module}; print(*(os.environ[f'{{name}}_DISABLE_TELEMETRY'] for name in ('ORT', 'HF_HUB')))"
    assert run(code=code).stdout == "1 1\n"
    assert run(code=code, ORT_DISABLE_TELEMETRY="0").stdout == "0 1\n", "a user's own choice stays"


@pytest.mark.parametrize("shell", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tiny_engines: Path, tmp_path: Path, shell: str) -> None:
    assert run("--engine", tiny_engines, "--class", 1, "--out", tmp_path, shell=shell).returncode == 0
    with Image.open(tmp_path / "class1-seed0.png") as image:
        image.load()
    assert json.loads((tmp_path / "run.json").read_text())["files"] == ["class1-seed0.png"]
    assert run("--engine", tiny_engines, "--class", "nothing", "--out", tmp_path, shell=shell).returncode == 1


def test_no_home(tiny_engines: Path, tmp_path: Path) -> None:
    """A user id without an entry in passwd, as containers have."""
    code = (
        "import os, pwd; os.environ.pop('HOME', None)\ndef fail(uid): raise KeyError(uid)\npwd.getpwuid = fail\n" + MAIN
    )
    result = run("--engine", tiny_engines, "--class", 1, "--out", tmp_path, code=code)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "class1-seed0.png").is_file()


def test_a_name_that_is_no_text(tiny_engines: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"o\xff\xfe")
    result = run("--engine", tiny_engines, "--class", 1, "--out", out)
    assert result.returncode == 0, result.stderr
    assert str(out / "class1-seed0.png") in result.stdout
    refused = run("--engine", out, "--class", 1, "--out", tmp_path)
    assert (
        refused.returncode == 1
        and "o\\udcff\\udcfe has no manifest" in refused.stderr
        and "Traceback" not in refused.stderr
    )


def test_pictures_of_other_runs_are_counted(tiny_engines: Path, tmp_path: Path) -> None:
    def make(label: int, num: int) -> tuple[dict[str, object], str]:
        result = run("--engine", tiny_engines, "--class", label, "--num", num, "--out", tmp_path)
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / "run.json").read_text(encoding="utf-8")), result.stderr

    report, said = make(1, 3)
    assert report["other_pictures"] == 0 and "other runs" not in said
    report, said = make(2, 1)
    assert report["files"] == ["class2-seed0.png"] and report["other_pictures"] == 3
    assert f"warning: {tmp_path} also holds 3 pictures of other runs" in said and "Do: name an empty --out" in said
    report, said = make(2, 1)
    assert report["other_pictures"] == 3


def test_a_run_that_fails_before_its_pictures_leaves_the_old_report(tiny_engines: Path, tmp_path: Path) -> None:
    words = ("--engine", tiny_engines, "--class", 1, "--out", tmp_path)
    assert run(*words).returncode == 0
    before = (tmp_path / "run.json").read_bytes()
    assert run(*words, "--noise", tmp_path / "nowhere.npy").returncode == 1
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_run_that_is_stopped_leaves_no_report_of_other_pictures(tiny_engines: Path, tmp_path: Path) -> None:
    words = ("--engine", tiny_engines, "--class", 1, "--out", tmp_path)
    assert run(*words).returncode == 0
    kill = "import os, runtime.cli.run as r; r.save_png = lambda *a, **k: os._exit(9); r.main()"
    assert run(*words, code=kill).returncode == 9
    assert not (tmp_path / "run.json").exists()
