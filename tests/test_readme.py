"""What the documents tell a reader to type exists: commands, options, scripts, files. The Python example runs."""

from __future__ import annotations

import importlib
import re
import shlex
from importlib.metadata import distribution
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "constraints").glob("*.txt")),
]
MAINS = {
    point.name: point.value for point in distribution("flowturbo").entry_points if point.name.startswith("flowturbo-")
}


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def lines(document: Path) -> list[list[str]]:
    """Words of every line of the shell blocks, continued lines joined."""
    text = "\n".join(blocks(document, "") + blocks(document, "bash") + blocks(document, "sh"))
    joined = re.sub(r"\\\n", " ", text).splitlines()
    return [
        shlex.split(line, comments=True)
        for line in joined
        if line.startswith(("flowturbo-", "bash ", "pip ", ".venv/bin/"))
    ]


def check_command(words: list[str]) -> None:
    module, _, function = MAINS[Path(words[0]).name].partition(":")
    command, rest = getattr(importlib.import_module(module), function), words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        default = getattr(command, "default", None)  # the command that may be left out
        command = command.commands[rest.pop(0) if rest[0] in command.commands or default is None else default]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in options, f"{' '.join(words)}: no {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_exist(document: Path) -> None:
    for words in lines(document):
        name = Path(words[0]).name
        if name == "bash":
            assert (ROOT / words[1]).is_file(), words
        elif name.startswith("flowturbo-"):
            check_command(words)


def test_a_command_that_does_not_exist_is_seen() -> None:
    check_command(shlex.split("flowturbo-export build-engines --out engines"))
    with pytest.raises(AssertionError, match="no --outt"):
        check_command(shlex.split("flowturbo-export build-engines --outt engines"))
    with pytest.raises(KeyError):
        check_command(shlex.split("flowturbo-export built-engines"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_extras_and_pins_exist(document: Path) -> None:
    extras = set(distribution("flowturbo").metadata.get_all("Provides-Extra") or ())
    text = document.read_text()
    for names in re.findall(r"(?:flowturbo|['`]\.)\[([a-z,]+)\]", text):
        assert set(names.split(",")) <= extras, names
    for name in re.findall(r"-c (constraints/\w+\.txt)", text):
        assert name == "constraints/pyXY.txt" or (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_the_first_lines_are_the_two_commands() -> None:
    assert [words[:2] for words in lines(ROOT / "README.md")[:2]] == [
        ["bash", "scripts/demo"],
        ["bash", "scripts/test"],
    ]


def test_the_python_example_runs(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the tests' small engines, which know other classes than the demo's."""
    (tmp_path / "engines").symlink_to(tiny_engines)
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(ROOT / "README.md", "python")
    assert '["golden retriever", 207]' in example
    exec(example.replace('["golden retriever", 207]', "[1, 2]"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "(2, 32, 32, 3) uint8"
