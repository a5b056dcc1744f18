"""The page and its plots: complete, escaped, and quiet in a real browser that has no network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pytest
from bench_reports import CONDITION, make_report, simulate_times

from flowturbo.evaluation.speed.bench_report import ALL_STAGES, BenchmarkReport, read_report
from flowturbo.evaluation.speed.html_page import render_html, write_page
from flowturbo.evaluation.speed.report_sections import MAX_POINTS
from flowturbo.evaluation.speed.svg import ChartLine, draw_line_chart, draw_stacked_bars
from runtime.system.errors import OutputError, RequestError
from runtime.system.files import write_json
from runtime.system.json_codec import to_json

NASTY = '</script><img src="http://example.com/x.png" onerror="alert(1)"> & "engines"'
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def a_report() -> BenchmarkReport:
    conditions = [
        replace(CONDITION, batch=batch, resolution=px, sampler=sampler)
        for batch, px, sampler in ((1, 64, "H1P5R3"), (4, 64, "H1P5R3"), (1, 128, "H1P5R3"), (1, 64, "H8"))
    ]
    conditions.append(replace(CONDITION, implementation="torch:eager"))
    return make_report(*((own, simulate_times(place, mean=20.0 * own.batch)) for place, own in enumerate(conditions)))


MAKER = ("google.com", "googleapis.com")
"""Whom Chromium calls by itself, whatever page it shows."""


class Tags(HTMLParser):
    """Every tag with its attributes; fails where they are not nested."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_all_that_the_report_says() -> None:
    report = a_report()
    text = render_html(report)
    for expected in (
        *ALL_STAGES, "images/s by images at once", "ms a run by pixels a side", "ms a run by evaluations of both networks",
        "First picture of a fresh process", "a meter: the board", "torch:eager", *report.warnings,
    ):  # fmt: skip
        assert expected in text, expected
    tags = Tags()
    tags.feed(text)
    assert tags.open == []


def test_the_page_asks_for_nothing_and_runs_nothing() -> None:
    tags = Tags()
    tags.feed(render_html(a_report()))
    for tag, attributes in tags.seen:
        assert tag not in ("img", "iframe", "object", "video", "audio")
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "script" or attributes["type"] == "application/json"
    assert not re.search(r"@import|url\(", render_html(a_report()))


def test_the_page_carries_its_data() -> None:
    report = a_report()
    data = re.search(r'id="report">(.*?)</script>', render_html(report), re.DOTALL)
    assert data is not None
    assert json.loads(data.group(1)) == json.loads(json.dumps(to_json(report)))


def test_names_are_text_and_never_markup() -> None:
    report = make_report((replace(CONDITION, engine=NASTY), simulate_times(0)), warnings=(NASTY,), command=(NASTY,))
    text = render_html(report)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert "img" not in {tag for tag, _ in tags.seen}
    assert text.count("</script>") == 1


def test_plots_are_well_formed_and_stay_in_their_frame() -> None:
    lines = [ChartLine(NASTY, [(1, 5.0), (8, 0.001)], [(4.0, 6.0), (0.0, 0.002)]), ChartLine("one point", [(3, 2.0)])]
    for plot in (
        draw_line_chart(lines, "x & y", "<y>"),
        draw_line_chart([ChartLine("zero", [(0, 0.0)])], "x", "y"),
        draw_stacked_bars([(NASTY, {"a": 3.0, "b & c": 0.0}), ("another", {"a": 1.0})], "ms"),
    ):
        root = ElementTree.fromstring(plot)
        width, height = (float(root.attrib[name]) for name in ("width", "height"))
        for circle in root.iter("circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height
        for box in root.iter("rect"):
            assert 0 <= float(box.attrib["x"]) <= float(box.attrib["x"]) + float(box.attrib["width"]) <= width
        assert [text for text in root.itertext() if text]


def test_a_line_of_many_runs_keeps_its_outlier() -> None:
    times = [10.0] * 5000
    times[1234] = 9999.0
    text = render_html(make_report((CONDITION, times)))
    drawn = max((path.count("L") for path in re.findall(r'd="M([^"]*)" fill="none"', text)), default=0)
    assert 0 < drawn <= MAX_POINTS
    assert "10000" in text  # the axis goes as high as the outlier


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = a_report()
    write_json(tmp_path / "bench.json", to_json(report))
    assert to_json(read_report(tmp_path / "bench.json")) == json.loads(json.dumps(to_json(report)))


def test_the_stable_core_of_the_json() -> None:
    """What other programs may rely on."""
    data = json.loads(json.dumps(to_json(a_report())))
    assert data["schema"] == 1
    assert {"stages", "image", "throughput", "memory", "environment", "conditions", "engines", "warnings"} <= set(data)
    assert set(data["stages"]) == {"conditioning", "predictor", "refiner", "decoder", "host", "png"}
    statistics = {"count", *(f"{name}_ms" for name in ("mean", "sd", "min", "p50", "p90", "p95", "p99", "max"))}
    assert set(data["image"]) == statistics
    assert set(data["stages"]["predictor"]) == statistics | {"calls_per_run", "per_run_ms"}
    assert {"engine", "sampler", "resolution", "batch", "images_per_s"} <= set(data["throughput"][0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "no report of flowturbo-bench"),
        ('{"schema": 1}', "lacks"),
        ('{"schema": 99, "flowturbo": "9"}', "by a newer flowturbo (9)"),
    ],
)
def test_other_files_are_no_reports(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(RequestError) as raised:
        read_report(tmp_path / "bench.json")
    assert says in raised.value.given
    assert raised.value.remedy


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write_page(tmp_path / "missing" / "bench.html", a_report())
    assert list(tmp_path.iterdir()) == []


def visited(browser: str, file: Path, folder: Path) -> tuple[list[str], list[str]]:
    """What a headless browser asked the network for, and what it wrote to the console, while it showed a page."""
    log = folder / "net.json"
    words = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
        *("--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000", f"--screenshot={folder / 'page.png'}"),
    ]
    done = subprocess.run([browser, *words, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert (folder / "page.png").stat().st_size > 10_000, done.stderr
    addresses = re.findall(r'"url":"(https?://[^"]+)"', log.read_text())
    addresses = [address for address in addresses if not (urlsplit(address).hostname or "").endswith(MAKER)]
    return sorted(set(addresses)), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser here; on Debian: apt-get install chromium")


@needs_browser
def test_a_browser_opens_the_page_without_network_or_complaint(tmp_path: Path) -> None:
    assert BROWSER is not None
    write_page(tmp_path / "bench.html", a_report())
    addresses, console = visited(BROWSER, tmp_path / "bench.html", tmp_path)
    assert (addresses, console) == ([], [])


@needs_browser
def test_a_page_that_asks_or_complains_is_seen(tmp_path: Path) -> None:
    """So that the test above can fail."""
    assert BROWSER is not None
    text = render_html(a_report()).replace(
        "<body>", '<body><img src="http://127.0.0.1:9/picture.png"><script>console.error("complaint")</script>'
    )
    (tmp_path / "bench.html").write_text(text)
    addresses, console = visited(BROWSER, tmp_path / "bench.html", tmp_path)
    assert "http://127.0.0.1:9/picture.png" in addresses
    assert any("complaint" in line for line in console)
