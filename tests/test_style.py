"""The checks of style behind `scripts/check`: each finds what it is for, and lets pass what is fine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts.lib import style

NAMES = style.read_names(style.NAMES.read_text(encoding="utf-8"))


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", "-C", root, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("load_manifest", True),
        ("_load", True),
        ("is_rebuilt", True),
        ("to_json", True),
        ("sampler_options", True),
        ("precision", True),
        ("compiled", False),
        ("rows_of", False),
        ("load_of", False),
        ("manifest", False),
        ("_precision_table", False),
    ],
)
def test_a_verb_a_boolean_or_a_listed_name(function: str, expected: bool) -> None:
    assert style.has_verb(function, NAMES) is expected


def test_functions_outside_tests_are_looked_at_wherever_they_are() -> None:
    source = (
        "class A:\n"
        "    def __init__(self): ...\n"
        "    @property\n"
        "    def side(self): ...\n"
        "    @main.command('x')\n"
        "    def table(): ...\n"
        "    async def judged(self):\n"
        "        def told(): ...\n"
    )
    complaints = style.find_odd_functions({"export/a.py": source, "tests/a.py": source}, NAMES)
    assert [complaint.partition(":")[2].split(":")[0] for complaint in complaints] == ["7 judged", "8 told"]
    assert all(complaint.startswith("export/a.py") and "Try: another name" in complaint for complaint in complaints)


def test_helpers_with_one_caller() -> None:
    sources = {
        "a.py": "def _once(): ...\ndef _twice(): ...\ndef public(): ...\n_once()\n_twice()\n",
        "tests/test_a.py": "import a\na._twice()\ndef _help(): ...\n_help()\n",
    }
    assert style.find_one_caller_helpers(sources) == ["a.py:1 _once"]
    assert style.compute_figures(sources)["one_caller_helpers_per_1000"] == 200


def test_figures_count_code_without_tests() -> None:
    code = "class A:\n    a: dict[str, Any]\n    b: Mapping[str, Any]\n    assert a is not None\n"
    figures = style.compute_figures({"a/x.py": code, "b/x.py": code, "tests/x.py": code, "a/__init__.py": "\n"})
    assert figures == {
        "lines_without_tests": 9,
        "one_caller_helpers_per_1000": 0,
        "mappings_of_any": 4,
        "asserts_not_none": 2,
        "duplicate_class_names": 1,
        "duplicate_file_names": 1,
    }


def test_sentences_are_counted_without_code_tables_and_headings() -> None:
    page = "# A heading of four words\n\nOne short sentence. Another\nshort one: like this list.\n\n```\nno code at all\n```\n| a | table |\n"
    assert style.split_sentences(page) == ["One short sentence.", "Another\nshort one:", "like this list."]
    assert style.find_long_sentences({"docs/a.md": page}) == []


def test_long_sentences_and_long_pages_are_found() -> None:
    complaints = style.find_long_sentences(
        {"docs/a.md": "word " * 35 + "end. " + "Two short words. " * 9, "docs/b.md": "word " * 20 + "end."}
    )
    assert [complaint.partition(" ")[2].split(",")[0] for complaint in complaints] == [
        "36 words",
        "21.0 words a sentence on average",
    ]
    assert [style.is_page(name) for name in ("README.md", "docs/a.md", "tests/README.md")] == [True, True, False]


def test_long_subjects_are_found_after_the_first_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert style.list_tracked_files(tmp_path) is None
    assert style.find_long_subjects(tmp_path) == []
    git(tmp_path, "init", "-q")
    for subject in ("a" * 80, "b" * 72, "c" * 73):
        git(tmp_path, "commit", "-q", "--allow-empty", "-m", subject)
    assert style.find_long_subjects(tmp_path) == [], "this repository does not know the first commit"
    monkeypatch.setattr(style, "FIRST_COMMIT", git(tmp_path, "rev-parse", "HEAD~2"))
    assert [complaint.partition(": ")[2] for complaint in style.find_long_subjects(tmp_path)] == [
        "73 characters in its subject, at most 72"
    ]


def test_only_tracked_files_are_read(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    for name in ("tracked.py", "untracked.py", "deleted.py"):
        (tmp_path / name).write_text("def judged(): ...\n")
    git(tmp_path, "add", "tracked.py", "deleted.py")
    (tmp_path / "deleted.py").unlink()
    names = style.list_tracked_files(tmp_path)
    assert names == ["tracked.py"]
    budgets = dict.fromkeys(style.compute_figures({}), 1.0)
    assert len(list(style.find_complaints(tmp_path, names, budgets))) == 1
    assert len(list(style.find_complaints(tmp_path, names, {}))) == 2


def test_a_budget_is_met_or_raised_knowingly() -> None:
    budgets = style.read_budgets("# why\n\na  3 # because\nb 2.5\n")
    assert budgets == {"a": 3.0, "b": 2.5}
    assert style.find_exceeded_budgets({"a": 3, "b": 2}, budgets) == []
    (complaint,) = style.find_exceeded_budgets({"a": 3.1}, budgets)
    assert complaint.startswith("a is 3.1, the budget 3.") and "style_budgets.txt" in complaint


def test_every_figure_has_a_budget() -> None:
    assert style.read_budgets(style.BUDGETS.read_text(encoding="utf-8")).keys() == style.compute_figures({}).keys()
