"""A build's folder: exchanged for the finished one in one step, and one build at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from export import stage as stage_module
from export.stage import check_engine_folder, open_stage, swap_folders
from runtime.directory.manifest import MANIFEST_FILE, read_manifest
from runtime.system.errors import EngineError, OutputError

ROOT = Path(__file__).parents[2]
KILL = """
import os, sys
from pathlib import Path
from export import stage
from export.stage import open_stage
out, point = Path(sys.argv[1]), sys.argv[2]
if point != "exchanged":
    stage.swap_folders = lambda first, second: False
real, count = os.replace, 0
def replace(source, target):
    global count
    count += 1
    if f"rename {count}" == point:
        os._exit(9)
    real(source, target)
with open_stage(out, "key") as opened:
    (opened.folder / "manifest.json").write_text('{"flowturbo": "new"}')
    (opened.folder / "stage.json").write_text("{}")
    os.replace = replace
    if point == "exchanged":
        stage.shutil.rmtree = lambda *a, **k: os._exit(9)
    opened.publish(out)
"""


def write_engines(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    (folder / MANIFEST_FILE).write_text(json.dumps({"flowturbo": name}))
    return folder


def read_name(folder: Path) -> str:
    return str(json.loads((folder / MANIFEST_FILE).read_text())["flowturbo"])


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_finished_stage_takes_the_place_of_the_former(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(stage_module, "swap_folders", lambda first, second: False)
    out = write_engines(tmp_path / "engines", "former")
    for name in ("second", "third"):
        with open_stage(out, name) as stage:
            (stage.folder / MANIFEST_FILE).write_text(json.dumps({"flowturbo": name}))
            stage.publish(out)
        assert read_name(out) == name
        assert os.listdir(tmp_path) == ["engines"] and os.listdir(out) == [MANIFEST_FILE]


def test_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    first, second = write_engines(tmp_path / "a", "a"), write_engines(tmp_path / "b", "b")
    if not swap_folders(first, second):
        pytest.skip("this file system cannot exchange folders")
    assert (read_name(first), read_name(second)) == ("b", "a")
    assert not swap_folders(first, tmp_path / "nowhere")


@pytest.mark.parametrize(("point", "kept"), [("rename 1", "former"), ("rename 2", "former"), ("exchanged", "new")])
def test_a_build_that_is_killed_while_it_publishes_loses_nothing(tmp_path: Path, point: str, kept: str) -> None:
    out = write_engines(tmp_path / "engines", "former")
    killed = subprocess.run([sys.executable, "-c", KILL, str(out), point], cwd=ROOT, check=False, timeout=60)
    assert killed.returncode == 9
    if point == "rename 2":  # between the two: there is no directory, and readers are told what to do
        with pytest.raises(EngineError) as caught:
            read_manifest(out)
        assert (
            "a build was stopped" in caught.value.given
            and f"mv {tmp_path / '.engines.old'} {out}" in caught.value.remedy
        )
    assert check_engine_folder(out) == out
    assert read_name(out) == kept
    with open_stage(out, "other key") as stage:
        (stage.folder / MANIFEST_FILE).write_text(json.dumps({"flowturbo": "next"}))
        stage.publish(out)
    assert read_name(out) == "next"
    assert os.listdir(tmp_path) == ["engines"], "no hidden file is left after the next start"


def test_one_build_at_a_time(tmp_path: Path) -> None:
    """Eight threads that open and remove the lock's file as fast as they can never hold it together."""
    out, inside, worst, errors = tmp_path / "engines", [0], [0], []
    guard = threading.Lock()

    def build() -> None:
        for _ in range(60):
            try:
                with open_stage(out, "key"):
                    with guard:
                        inside[0] += 1
                        worst[0] = max(worst[0], inside[0])
                    with guard:
                        inside[0] -= 1
            except OutputError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst[0] == 1
    assert all("another build is writing" in error and "Do: wait for it" in error for error in errors)
    assert not os.listdir(tmp_path)
