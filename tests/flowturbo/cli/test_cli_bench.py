"""`flowturbo-bench` as users type it: a report of real engines, samplers side by side, a planted regression, mistakes."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from bench_reports import CONDITION, make_report, simulate_times
from click.testing import CliRunner, Result

from flowturbo.cli.bench import main
from flowturbo.evaluation.speed.baselines import BASELINE_MODES, parse_baselines
from flowturbo.evaluation.speed.conditions import build_engine_subject
from flowturbo.evaluation.speed.terminal_tables import render_benchmark
from flowturbo.evaluation.speed.timed_pipeline import HostTimer
from runtime.backends import fake
from runtime.cli.command_base import check_output_path
from runtime.directory.manifest import MANIFEST_FILE
from runtime.system.errors import OutputError

pytestmark = pytest.mark.filterwarnings("ignore:refiner steps")
QUICK = ("--repeats", 2, "--warmup", 1, "--no-cold", "--no-energy")


def bench(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def report(*words: object) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(bench(*words, "--json").stdout)
    return data


def test_a_report_of_real_engines(tiny_engines: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "new" / "bench.json", tmp_path / "bench.html"
    words = (tiny_engines, "--batch", "1,2", "--schedule", "H1P2R3", "--threads", 1, "--repeats", 3, "--no-energy")
    said = bench(*words, "--out", out, "--html", page).stdout
    data = json.loads(out.read_text())
    first = data["conditions"][0]
    assert first["nfe"] == {"predictor": 4, "refiner": 6}
    assert {name: stage["calls_per_run"] for name, stage in data["stages"].items()} == {
        "conditioning": 2, "predictor": 4, "refiner": 6, "decoder": 1, "host": 1, "png": 1,
    }  # fmt: skip
    assert data["image"]["count"] == 3
    spent = sum(stage["per_run_ms"] for stage in data["stages"].values())
    assert spent == pytest.approx(data["image"]["mean_ms"], rel=1e-3)  # the stages are the whole
    assert all(ms >= 0 for ms in first["samples"]["host_ms"])
    assert [entry["batch"] for entry in data["throughput"]] == [1, 2]
    assert data["engines"]["engines"]["hash"]
    assert data["environment"]["cpu"]["model"]
    without, kept = data["cold"]
    assert (without["caches"], kept["caches"]) == ("none", "kept")
    parts = sum(without[f"{part}_ms"] for part in ("process", "import", "load", "first_image"))
    assert parts == pytest.approx(without["total_ms"], rel=0.1)
    assert without["compile_ms"] is None
    assert "part of load_ms" in without["compile_note"]
    alone = data["memory"]["alone"][0]
    assert alone["peak_rss_bytes"] > alone["weight_bytes"] > 0
    for expected in ("H1P2R3", "first picture of a fresh process", "predictor", str(out), str(page)):
        assert expected in said
    assert "<svg" in page.read_text()


def test_samplers_take_turns_and_are_compared(tiny_engines: Path) -> None:
    options = ("--schedule", "H1P1R1", "--schedule", "H2", "--solver", "heun", "--steps", 3, "--backend", "fake")
    data = report(tiny_engines, *options, *QUICK, "--class", 3, "--guidance", 1)
    assert [c["condition"]["sampler"] for c in data["conditions"]] == ["H1P1R1", "H2", "heun-3"]
    assert [(c["condition"], c["against"]) for c in data["comparisons"]] == [(1, 0), (2, 0)]
    assert data["conditions"][0]["condition"]["guidance"] == 1


def test_adaptive_samplers_are_measured_with_what_they_took(tiny_engines: Path) -> None:
    data = report(tiny_engines, "--adaptive", "lte", "--tolerance", 0.05, "--backend", "fake", *QUICK)
    assert any("no figures of the engines" in warning for warning in data["warnings"])
    (only,) = data["conditions"]
    assert only["nfe"]["predictor"] > 1
    assert only["stages"]["predictor"]["calls_per_run"] == only["nfe"]["predictor"]


def test_two_directories_take_turns(tiny_engines: Path, nosigma_engines: Path) -> None:
    data = report(tiny_engines, nosigma_engines, "--schedule", "H2", "--backend", "fake", *QUICK)
    labels = [c["condition"]["engine"] for c in data["conditions"]]
    assert labels == [str(tiny_engines), str(nosigma_engines)]  # both are called engines
    assert data["conditions"][1]["stages"]["decoder"]["count"] == 0  # built without one
    assert data["conditions"][1]["stages"]["decoder"]["p50_ms"] is None


def test_the_decoder_can_be_left_out(tiny_engines: Path) -> None:
    data = report(tiny_engines, "--vae", "none", "--backend", "fake", *QUICK)
    assert data["stages"]["decoder"]["count"] == 0
    assert data["stages"]["png"]["p50_ms"] < 0.1


def test_a_batch_beyond_the_engines_is_split_and_said(tiny_engines: Path) -> None:
    data = report(tiny_engines, "--batch", 7, "--schedule", "H1", "--backend", "fake", *QUICK)
    assert data["stages"]["predictor"]["calls_per_run"] == 6
    assert any("batch 7 runs in 3 parts" in warning for warning in data["warnings"])


@pytest.fixture
def slow_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], None]:
    """Sets how many times slower the fake device is, on a clock of its own: every call takes some 10 ms, give or take.

    The noise is a machine's: neighbours alike, some calls late; `seed` decides it.
    """
    now, factor, noise = [0.0], [1.0], [iter(())]
    run = fake.FakeEngine.run

    def run_timed(self: fake.FakeEngine, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        run(self, inputs, outputs)
        now[0] += factor[0] * next(noise[0])  # type: ignore[call-overload]

    def clock() -> int:
        return round(1e6 * now[0])

    def build_clocked_subject(*arguments: Any, **more: Any) -> Any:
        subject = build_engine_subject(*arguments, **more)
        subject.clock, subject.pipeline.recorder.timer = clock, HostTimer(clock)
        return subject

    monkeypatch.setattr(fake.FakeEngine, "run", run_timed)
    monkeypatch.setattr("flowturbo.evaluation.speed.bench_job.build_engine_subject", build_clocked_subject)
    monkeypatch.setattr("flowturbo.evaluation.speed.rounds.time_yardstick", lambda clock: 2.0)

    def set_factor(times: float, seed: int) -> None:
        factor[0], noise[0] = times, iter(simulate_times(seed, 5000, mean=10.0, noise=0.05))  # type: ignore[assignment]

    return set_factor


def test_a_slow_backend_is_found_end_to_end_and_noise_is_not(
    tiny_engines: Path, tmp_path: Path, slow_by: Callable[[float, int], None]
) -> None:
    """The whole way, from the fake device through two reports to the verdict: a tenth slower, and as fast as before."""
    words = (tiny_engines, "--schedule", "H2", "--backend", "fake", "--repeats", 40, "--no-cold", "--no-energy")
    for name, times, seed in (("before", 1.0, 1), ("again", 1.0, 2), ("slower", 1.1, 3)):
        slow_by(times, seed)
        bench(*words, "--out", tmp_path / f"{name}.json")
    steady = json.loads(bench("compare", tmp_path / "before.json", tmp_path / "again.json", "--json").stdout)
    assert steady["regressions"] == []
    found = bench("compare", tmp_path / "before.json", tmp_path / "slower.json", "--fail-on-regression", code=1)
    assert re.search(r"predictor 1\.(0[6-9]|1[0-4])", found.stdout)  # the stages that moved
    assert "error: slower: engines H2" in found.stderr
    back = bench("compare", tmp_path / "slower.json", tmp_path / "before.json", "--fail-on-regression")
    assert "faster" in back.stdout


def test_a_gate_that_cannot_judge_says_so(tiny_engines: Path, tmp_path: Path) -> None:
    bench(tiny_engines, "--backend", "fake", *QUICK, "--out", tmp_path / "few.json")
    said = bench("compare", tmp_path / "few.json", tmp_path / "few.json", "--fail-on-regression")
    assert "no verdict on engines" in said.stderr
    assert "too few samples" in said.stdout


def test_a_narrow_terminal_shows_fewer_numbers_whole() -> None:
    from rich.console import Console

    for width, expected in ((80, ("p50", "p95")), (200, ("p50", "p99", "max"))):
        console = Console(width=width, file=io.StringIO())
        render_benchmark(make_report((CONDITION, simulate_times(0))), console)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert all(name in said for name in expected)
        assert "engines H1P5R3" in said


def test_the_engines_may_be_named_first_or_after_run(tiny_engines: Path) -> None:
    for words in (("--backend", "fake", tiny_engines), ("run", tiny_engines, "--backend", "fake")):
        assert "images/s" in bench(*words, *QUICK).stdout


def test_help_shows_the_options_of_the_command_that_may_be_left_out() -> None:
    text = bench("--help").stdout
    for expected in ("compare", "roofline", "--baseline", "--schedule", "--html", "docs/benchmark.md"):
        assert expected in text


def test_estimates_for_devices() -> None:
    data = report("roofline", "--no-measure", "--model", "XL", "--schedule", "H1P5R3", "--device", "AGX Orin")
    (estimate,) = data["estimates"]
    assert estimate["device"]["source"]
    assert 200 < estimate["sampling_ms"] < 260
    said = bench("roofline", "--no-measure", "--model", "B", "--device", "RTX 4090").stdout
    assert "ESTIMATES" in said
    assert "ms per picture, H2P8R2" in said
    assert "SiT-B/2" in said


def test_what_engines_reach_of_this_machine(tiny_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowturbo.evaluation.speed.roofline import MachineLimits

    monkeypatch.setattr(
        "flowturbo.cli.bench_roofline.measure_best_limits", lambda: MachineLimits({"fp32": 1e15}, 1e15, "made up")
    )
    data = report("roofline", tiny_engines, "--schedule", "H1P1R1", "--threads", 1, "--repeats", 1, "--device", "Thor")
    (rows,) = data["achieved"].values()
    assert {row["stage"] for row in rows} == {"conditioning", "predictor", "refiner", "decoder"}
    assert all(0 < row["share"] < 1 for row in rows)
    assert "reached" in bench("roofline", tiny_engines, "--repeats", 1, "--device", "Thor").stdout


def test_it_measures_where_torch_cannot_be_imported(tiny_engines: Path) -> None:
    from test_arrows import REFUSE

    code = f"{REFUSE}\nfrom flowturbo.cli.bench import main\nmain({[str(tiny_engines), *map(str, QUICK), '--json']!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["image"]["count"] == 2
    code = code.replace("'--json'", "'--baseline', 'torch'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "the baseline torch needs" in done.stderr
    assert "pip install 'flowturbo[export]'" in done.stderr
    assert "Traceback" not in done.stderr


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text("{")


MISTAKES = [
    ("no engines", "{tmp}/none", ("no engine directory", "build-engines"), 1),
    ("a file", "{tmp}/file", ("is a file", "build-engines"), 1),
    ("a damaged manifest", "{tmp}/broken", ("damaged", "build-engines"), 1),
    ("the same twice", "{engines} {engines}", ("named twice", "--repeats"), 1),
    ("batch nought", "{engines} --batch 0", ("batch 0", "1 to 1024"), 1),
    ("batch words", "{engines} --batch 1,two", ("--batch '1,two'", "whole numbers"), 1),
    ("batch twice", "{engines} --batch 1,1", ("--batch '1,1'", "different"), 1),
    ("resolution", "{engines} --resolution 48", ("resolution 48", "32", "build-engines"), 1),
    ("resolution words", "{engines} --resolution big", ("--resolution 'big'", "whole numbers"), 1),
    ("class", "{engines} --class 207", ("class 207", "0 class 0"), 1),
    ("schedule", "{engines} --schedule Q3", ("'Q3'", "Allowed"), 1),
    ("sampler twice", "{engines} --schedule H2 --schedule H2", ("asked for twice", "once"), 1),
    ("two scales", "{engines} --guidance 1,4", ("--guidance 1,4", "one scale"), 1),
    ("decoder", "{engines} --vae mse", ("'mse'", "Allowed"), 1),
    ("tiles", "{engines} --tile 8", ("tiles of 8 pixels", "build-engines --tile"), 1),
    ("backend", "{engines} --backend tensorrt --no-cold", ("backend tensorrt", "doctor"), 1),
    ("baseline", "{engines} --baseline jax", ("baseline 'jax'", "torch"), 1),
    ("mode", "{engines} --baseline torch:fast", ("torch:fast", "torch:eager"), 1),
    ("checkpoint role", "{engines} --checkpoint unet=x.pt", ("unet=x.pt", "predictor=FILE"), 1),
    ("checkpoint missing", "{engines} --baseline torch:eager --checkpoint predictor={tmp}/no.pt", ("no.pt", "--checkpoint predictor=FILE"), 1),
    ("checkpoint unnamed", "{engines} --baseline torch:eager", ("not built from the demo's predictor", "sha256", "--checkpoint"), 1),
    ("out is a folder", "{engines} --out {tmp}", ("cannot write", "a file of its own"), 1),
    ("repeats", "{engines} --repeats 0", ("--repeats", "0 is not in the range"), 2),
    ("duration", "{engines} --duration -1", ("--duration", "range"), 2),
    ("option", "{engines} --batches 1", ("No such option", "--batch"), 2),
    ("compare one", "compare {tmp}/file", ("Missing argument", "AFTER"), 2),
    ("compare no report", "compare {tmp}/file {tmp}/file", ("cannot be read", "--out FILE.json"), 1),
    ("compare missing", "compare {tmp}/a.json {tmp}/b.json", ("there is no report of flowturbo-bench at", "a.json", "--out FILE.json"), 1),
    ("device", "roofline --device 'Cray 1' --no-measure", ("no such device", "RTX 4090"), 1),
    ("adaptive roofline", "roofline {tmp}/adaptive --no-measure", ("chooses its steps", "fixed"), 1),
    ("another resolution", "roofline {engines} --resolution 4096 --no-measure", ("resolution 4096", "build-engines"), 1),
    ("one file for two", "{engines} --out {tmp}/a.json --html {tmp}/a.json", ("--out and --html both", ".html file"), 1),
    ("model and engines", "roofline {engines} --model B --no-measure", ("--model", "one or the other"), 1),
    ("resolution of a roofline", "roofline --resolution 100 --no-measure", ("resolution 100", "multiples of 16"), 1),
]  # fmt: skip


@pytest.mark.parametrize(("words", "says", "code"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_a_mistake_is_one_message(
    words: str, says: tuple[str, ...], code: int, tiny_engines: Path, tmp_path: Path
) -> None:
    import shlex

    (tmp_path / "file").write_text("no engines")
    if "broken" in words or "adaptive" in words:
        shutil.copytree(tiny_engines, tmp_path / "copy")
        break_manifest(tmp_path / "copy") if "broken" in words else make_adaptive(tmp_path / "copy")
        (tmp_path / "copy").rename(tmp_path / ("broken" if "broken" in words else "adaptive"))
    before = sorted(path.name for path in tmp_path.iterdir())
    filled = shlex.split(words.format(engines=tiny_engines, tmp=tmp_path))
    result = bench(*filled, code=code)
    for part in says:
        assert part in result.stderr, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def make_adaptive(folder: Path) -> None:
    """A directory whose default sampler chooses its steps."""
    data = json.loads((folder / MANIFEST_FILE).read_text())
    data["defaults"] |= {"schedule": None, "solver": "dopri5", "steps": None}
    (folder / MANIFEST_FILE).write_text(json.dumps(data))


def test_a_mode_is_measured_once_and_a_bare_name_means_all() -> None:
    assert parse_baselines(["torch:eager,torch:eager"]) == ("eager",)
    assert parse_baselines(["torch", "torch:eager"]) == parse_baselines(["torch:eager", "torch"]) == BASELINE_MODES


def test_a_place_that_cannot_be_written_is_found_out_beforehand(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        check_output_path(Path("/proc/self/x.json"))
    check_output_path(tmp_path / "new" / "x.json")
    assert list((tmp_path / "new").iterdir()) == []
