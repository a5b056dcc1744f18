"""Options that are declared as fields: what click makes of them, what arrives, --config, --help and --help-all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner, Result

from runtime.cli.command_base import Command
from runtime.cli.dataclass_options import OptionDefaults, list_given_options, options
from runtime.cli.lazy_group import LazyGroup
from runtime.system.errors import RequestError
from runtime.system.option_fields import REQUIRED, argument, option, parse_numbers, split_words


@dataclass(frozen=True)
class NoiseOptions:
    """Inner options."""

    form: str = option("sigma", "--noise", help="Form.", choices=("sigma", "linear"))
    norm: float = option(1.0, "--noise-norm", help="Size.", advanced=True)

    def __post_init__(self) -> None:
        if self.norm > 100:
            raise RequestError(f"noise norm {self.norm:g}", allowed="at most 100")


@dataclass(frozen=True)
class PaintOptions:
    """Every kind of option."""

    folder: Path = argument(REQUIRED)
    words: tuple[str, ...] = argument(())
    classes: tuple[str, ...] = option(REQUIRED, "--class", help="Repeated.")
    sizes: tuple[int, ...] = option((), "--size", help="Repeated numbers.")
    steps: int | None = option(None, help="May be missing.", minimum=1, maximum=10, default_text="chosen")
    seed: int = option(0, help="Has a default.")
    scale: float = option(4.0, help="A number.", minimum=0, is_open=True)
    mode: Literal["fast", "exact"] = option("fast", help="A choice.")
    quiet: bool = option(False, help="A flag.")
    cold: bool = option(True, "--cold/--no-cold", help="On and off.")
    out: Path = option(Path("out"), help="A path.", advanced=True)
    interval: tuple[float, ...] = option(
        (0.0, 1.0), help="Parsed.", default_text="0,1", parse=lambda name, text: tuple(parse_numbers(name, text, 2))
    )
    metrics: tuple[str, ...] = option((), help="Words.", parse=split_words)
    noise: NoiseOptions | None = option(None, help="Of noise.")
    not_an_option: str = "kept"


@dataclass(frozen=True)
class SharedOptions:
    """Another group with one option of the first."""

    seed: int = option(7, help="The same option.")
    extra: str = option("x", help="Of this group alone.", advanced=True)


def call(*words: object, groups: tuple[Any, ...] = (PaintOptions,)) -> tuple[Result, list[Any]]:
    received: list[Any] = []

    @click.command(cls=Command)
    @options(*groups)
    def command(*instances: Any) -> None:
        """Paint."""
        received.extend(instances)
        received.append(list_given_options())

    return CliRunner().invoke(command, [str(word) for word in words]), received


def paint(*words: object) -> Any:
    result, received = call("folder", "--class", "a", *words)
    assert result.exit_code == 0, result.output
    return received[0]


def test_nothing_given_is_the_dataclass_with_its_defaults() -> None:
    assert paint() == PaintOptions(folder=Path("folder"), classes=("a",))


CASES: list[tuple[list[object], str, object]] = [
    (["--class", "b"], "classes", ("a", "b")),
    (["--size", 1, "--size", 2], "sizes", (1, 2)),
    (["--steps", 3], "steps", 3),
    (["--scale", 0.5], "scale", 0.5),
    (["--mode", "exact"], "mode", "exact"),
    (["--quiet"], "quiet", True),
    (["--no-cold"], "cold", False),
    (["--out", "x/y"], "out", Path("x/y")),
    (["--interval", "0.3,0.7"], "interval", (0.3, 0.7)),
    (["--metrics", "fid, is"], "metrics", ("fid", "is")),
    (["more", "words"], "words", ("more", "words")),
    (["--noise", "linear"], "noise", NoiseOptions("linear")),
    (["--noise-norm", "2"], "noise", NoiseOptions("sigma", 2.0)),
]


@pytest.mark.parametrize(("words", "name", "expected"), CASES, ids=[case[1] for case in CASES])
def test_an_option_arrives_with_its_type(words: list[object], name: str, expected: object) -> None:
    assert getattr(paint(*words), name) == expected


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (["--steps", 11], "--steps", 2),
        (["--scale", 0], "--scale", 2),
        (["--mode", "slow"], "'fast', 'exact'", 2),
        (["--noise", "pink"], "--noise", 2),
        (["--stepps", 1], "Did you mean", 2),
        (["--interval", "1"], "--interval '1'", 1),  # parsed in the command, so that it is one message
        (["--noise-norm", 101], "at most 100", 1),
    ],
)
def test_a_mistake_is_refused(words: list[object], says: str, code: int) -> None:
    result, received = call("folder", "--class", "a", *words)
    assert result.exit_code == code
    assert says in result.stderr
    assert not received


def test_what_is_required_is_asked_for() -> None:
    assert "Missing option '--class'" in call("folder")[0].stderr
    assert "Missing argument 'FOLDER'" in call("--class", "a")[0].stderr


@dataclass(frozen=True)
class PointOptions:
    """An option that is both parsed and required."""

    point: tuple[float, ...] = option(REQUIRED, help="x,y", parse=lambda name, text: tuple(parse_numbers(name, text)))


def test_a_parsed_option_may_be_required() -> None:
    assert "Missing option '--point'" in call(groups=(PointOptions,))[0].stderr
    assert call("--point", "1,2", groups=(PointOptions,))[1][0] == PointOptions(point=(1.0, 2.0))


@dataclass(frozen=True)
class FileOptions:
    """A required option that is not repeated."""

    out: Path = option(REQUIRED, help="File.")


def test_a_single_option_may_be_required() -> None:
    assert "Missing option '--out'" in call(groups=(FileOptions,))[0].stderr


def test_two_dataclasses_share_an_option() -> None:
    _, (first, second, given) = call("f", "--class", "a", "--seed", 3, groups=(PaintOptions, SharedOptions))
    assert (first.seed, second.seed, second.extra) == (3, 3, "x")
    assert given == {"seed", "class", "folder"}


def test_a_command_has_its_own_defaults() -> None:
    groups = (OptionDefaults(SharedOptions(seed=9), omit=("extra",)),)
    _, (shared, _) = call(groups=groups)
    assert shared == SharedOptions(seed=9)
    result, _ = call("--extra", "y", groups=groups)
    assert "No such option" in result.stderr
    assert "[default: 9]" in call("--help", groups=groups)[0].stdout


def test_help_leaves_out_what_help_all_shows() -> None:
    short, long = (call(flag, groups=(PaintOptions, SharedOptions))[0].stdout for flag in ("--help", "--help-all"))
    for text in (short, long):
        for expected in ("--class", "--cold / --no-cold", "[default: chosen]", "--config FILE", "[default: 0]"):
            assert expected in text
        assert text.index("--seed") < text.index("--config")
    for advanced in ("--out", "--noise-norm", "--extra"):
        assert advanced not in short
        assert advanced in long


def write_config(folder: Path, content: str | dict[str, Any]) -> Path:
    path = folder / ("config.json" if isinstance(content, dict) else "config.toml")
    path.write_text(json.dumps(content) if isinstance(content, dict) else content)
    return path


TABLE = {
    "class": ["a", 207], "steps": 5, "scale": 2, "quiet": True, "cold": False, "interval": [0.25, 0.75],
    "mode": "exact", "noise-norm": 2.5, "folder": "data", "size": 3,
}  # fmt: skip
TOML = """
class = ["a", 207]
steps = 5
scale = 2
quiet = true
cold = false
interval = [0.25, 0.75]
mode = "exact"
noise_norm = 2.5
folder = "data"
size = 3
"""


@pytest.mark.parametrize("content", [TABLE, TOML], ids=["json", "toml"])
def test_a_file_holds_options(content: str | dict[str, Any], tmp_path: Path) -> None:
    result, received = call("--config", write_config(tmp_path, content))
    assert result.exit_code == 0, result.output
    assert received[0] == PaintOptions(
        folder=Path("data"), classes=("a", "207"), sizes=(3,), steps=5, scale=2.0, mode="exact", quiet=True,
        cold=False, interval=(0.25, 0.75), noise=NoiseOptions(norm=2.5),
    )  # fmt: skip
    assert received[-1] == {name.replace("-", "_") for name in TABLE}


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = write_config(tmp_path, TOML)
    _, received = call("other", "--class", "b", "--steps", 6, "--cold", "--config", path)
    assert (received[0].folder, received[0].classes, received[0].steps) == (Path("other"), ("b",), 6)
    assert received[0].cold is True
    assert received[0].mode == "exact"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("stepps = 3", ("option 'stepps'", "Do: write steps", "Allowed: ")),
        ("zzz = 3", ("option 'zzz'", "Do: leave it out")),
        ("[steps]\na = 1", ("is a table",)),
        ("steps = ", ("cannot be read", "a TOML file")),
        ("steps = 3.5", ("'3.5' is not a valid integer",)),
        ("steps = 30", ("--steps", "range")),
        ("mode = 'slow'", ("--mode", "'fast', 'exact'")),
        ("config = 'other.toml'", ("option 'config'",)),
    ],
)
def test_a_mistake_in_the_file_is_refused(content: str, says: tuple[str, ...], tmp_path: Path) -> None:
    result, received = call("folder", "--class", "a", "--config", write_config(tmp_path, content))
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    for words in says:
        assert words in result.stderr
    assert not received


def test_a_file_that_is_missing_or_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    for name, says in (("none.toml", "cannot be read"), ("list.json", "holds a list")):
        result, _ = call("folder", "--class", "a", "--config", tmp_path / name)
        assert result.exit_code == 2
        assert says in result.stderr


def make_group() -> click.Group:
    places = {
        "inspect": ("export.cli.directory_commands:inspect", "Show."),
        "broken": ("export.no_such_module:main", "Fail."),
    }

    @click.group(cls=LazyGroup, commands=places, purpose="testing", extra="export")
    def group() -> None:
        """Group."""

    return group


def test_a_lazy_group_lists_its_commands_without_importing_them() -> None:
    result = CliRunner().invoke(make_group(), ["--help"])
    assert result.exit_code == 0, result.output
    assert "inspect  Show." in result.output
    assert "broken   Fail." in result.output
    assert "--json" in CliRunner().invoke(make_group(), ["inspect", "--help"]).output
    assert isinstance(CliRunner().invoke(make_group(), ["broken"]).exception, ModuleNotFoundError)  # a bug of ours
    assert CliRunner().invoke(make_group(), ["other"]).exit_code == 2


def test_the_help_of_flowturbo_export_imports_no_command() -> None:
    code = (
        "import sys\nfrom export.cli.export import main\nmain(['--help'], standalone_mode=False)\n"
        "print([name for name in sys.modules if name.startswith(('export.', 'torch', 'onnx'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['export.cli', 'export.cli.export']"


@pytest.mark.parametrize("missing", ["torch", ""])
def test_a_missing_package_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Callable[..., None]:
        raise ImportError("torch is refused", name=missing or None)

    monkeypatch.setattr("importlib.import_module", fail)
    result = CliRunner().invoke(make_group(), ["inspect"])
    assert result.exit_code == 1
    assert "error: testing needs torch" in result.stderr
    assert "Do: pip install 'flowturbo[export]'" in result.stderr
