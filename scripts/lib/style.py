"""Check the style that CONTRIBUTING.md asks for: names, sentences, commit subjects and budgets of size.

Only files that git tracks are read. Needs nothing but Python and git; `scripts/check` runs it.
usage: python scripts/lib/style.py [--figures]
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).with_name("style_budgets.txt")
NAMES = Path(__file__).with_name("style_names.txt")
FIRST_COMMIT = "083078a"
"""Subjects of commits after this one are checked."""
MAX_SUBJECT = 72
MAX_SENTENCE_WORDS = 35
MAX_MEAN_WORDS = 18.0

EXEMPT_SUFFIXES = ("_options", "_option", "_to_json", "_from_json")
"""Decorators that add click options, and conversions that name what they convert."""
Sources = Mapping[str, str]
"""Text of files by path."""


def list_tracked_files(root: Path) -> list[str] | None:
    """Return the paths of all files that git tracks and that exist; None outside a git checkout."""
    output = _run_git(root, "ls-files")
    return None if output is None else [name for name in output.splitlines() if (root / name).is_file()]


def read_sources(root: Path, names: list[str], suffix: str) -> dict[str, str]:
    """Return the text of the tracked files with a suffix."""
    return {
        name: (root / name).read_text(encoding="utf-8", errors="replace") for name in names if name.endswith(suffix)
    }


def is_test(name: str) -> bool:
    """Whether a path belongs to the tests, which no budget counts."""
    return name.startswith("tests/")


def compute_figures(sources: Sources) -> dict[str, float]:
    """Return the figures that style_budgets.txt limits, of Python files by path."""
    code = {name: text for name, text in sources.items() if not is_test(name)}
    lines = sum(text.count("\n") for text in code.values())
    return {
        "lines_without_tests": lines,
        "one_caller_helpers_per_1000": round(1000 * len(find_one_caller_helpers(sources)) / max(1, lines), 1),
        "mappings_of_any": sum(len(re.findall(r"(?:Mapping|dict)\[str, Any\]", text)) for text in code.values()),
        "asserts_not_none": sum(len(re.findall(r"(?m)^\s*assert .* is not None", text)) for text in code.values()),
        "duplicate_class_names": len(find_duplicate_classes(code)),
        "duplicate_file_names": len(find_duplicate_files(code)),
    }


def find_one_caller_helpers(sources: Sources) -> list[str]:
    """Return `path:line name` of private functions whose name is used once, by code or tests."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    uses = Counter(
        node.id if isinstance(node, ast.Name) else node.attr
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Name, ast.Attribute))
    )
    return [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in trees.items()
        if not is_test(name)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if node.name.startswith("_") and not node.name.startswith("__") and uses[node.name] == 1
    ]


def find_duplicate_classes(sources: Sources) -> dict[str, list[str]]:
    """Return the files of every class name that occurs twice."""
    places = defaultdict(list)
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    return {name: files for name, files in places.items() if len(files) > 1}


def find_duplicate_files(sources: Sources) -> dict[str, list[str]]:
    """Return the paths of every module file name that occurs twice."""
    places = defaultdict(list)
    for name in sources:
        if Path(name).name not in ("__init__.py", "__main__.py", "cli.py"):
            places[Path(name).name].append(name)
    return {name: files for name, files in places.items() if len(files) > 1}


def read_names(text: str) -> dict[str, frozenset[str]]:
    """Return the words of every section of style_names.txt."""
    sections: dict[str, set[str]] = {}
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if words and words[0].startswith("["):
            section = sections.setdefault(words[0].strip("[]"), set())
        elif words:
            section.update(words)
    return {section: frozenset(words) for section, words in sections.items()}


def find_odd_functions(sources: Sources, names: Mapping[str, frozenset[str]]) -> list[str]:
    """Return a complaint for every function that begins with no verb, outside tests."""
    return [
        f"{name}:{node.lineno} {node.name}: a function begins with a verb. Try: another name, or a word in "
        f"scripts/lib/{NAMES.name} with the reason"
        for name, text in sources.items()
        if not is_test(name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if not _is_exempt(node) and not has_verb(node.name, names)
    ]


def has_verb(function: str, names: Mapping[str, frozenset[str]]) -> bool:
    """Whether a function's name is a verb in the imperative, a boolean, a conversion or a listed exception."""
    name = function.strip("_")
    first = name.partition("_")[0]
    if name in names["exceptions"] or name.endswith(EXEMPT_SUFFIXES) or first in names["prefixes"]:
        return True
    return first in names["verbs"] and not name.endswith("_of")


def _is_exempt(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is a method of Python's own, read like an attribute, or named by its command."""
    decorators = {ast.unparse(d.func if isinstance(d, ast.Call) else d).rpartition(".")[2] for d in node.decorator_list}
    is_special = node.name.startswith("__") and node.name.endswith("__")
    return is_special or bool(decorators & {"property", "cached_property", "setter", "command", "group"})


def find_long_sentences(pages: Sources) -> list[str]:
    """Return a complaint for every sentence and every page of Markdown that is too long to read."""
    complaints = []
    for name, text in pages.items():
        lengths = []
        for sentence in split_sentences(text):
            lengths.append(len(sentence.split()))
            if lengths[-1] > MAX_SENTENCE_WORDS:
                start = " ".join(sentence.split()[:8])
                complaints.append(f"{name}: {lengths[-1]} words, at most {MAX_SENTENCE_WORDS}: {start} …")
        if lengths and sum(lengths) / len(lengths) > MAX_MEAN_WORDS:
            mean = sum(lengths) / len(lengths)
            complaints.append(f"{name}: {mean:.1f} words a sentence on average, at most {MAX_MEAN_WORDS:g}")
    return complaints


def split_sentences(page: str) -> list[str]:
    """Return the sentences of a page of more than two words, without code, tables, headings, images and quotes."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "!", ">")))
    return [sentence for sentence in re.split(r"(?<=[.!?:])\s+", text.strip()) if len(sentence.split()) > 2]


def is_page(name: str) -> bool:
    """Whether a tracked Markdown file is documentation: the top pages and docs/."""
    return name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md") or name.startswith("docs/")


def find_long_subjects(root: Path) -> list[str]:
    """Return a complaint for every commit after FIRST_COMMIT with a long subject; none where that is not known."""
    log = _run_git(root, "log", "--format=%h %s", f"{FIRST_COMMIT}..HEAD") or ""
    return [
        f"commit {commit}: {len(subject)} characters in its subject, at most {MAX_SUBJECT}"
        for commit, _, subject in (line.partition(" ") for line in log.splitlines())
        if len(subject) > MAX_SUBJECT
    ]


def read_budgets(text: str) -> dict[str, float]:
    """Return the numbers of style_budgets.txt by name."""
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return {words[0]: float(words[1]) for words in lines if words}


def find_exceeded_budgets(figures: Mapping[str, float], budgets: Mapping[str, float]) -> list[str]:
    """Return a complaint for every figure above its budget, or without one."""
    return [
        f"{name} is {figure:g}, the budget {budgets.get(name, 0):g}. Try: delete or merge code first; "
        f"scripts/lib/{BUDGETS.name} says how to raise a budget knowingly"
        for name, figure in figures.items()
        if figure > budgets.get(name, 0)
    ]


def find_complaints(root: Path, names: list[str], budgets: Mapping[str, float]) -> Iterator[str]:
    """Yield every complaint about a checkout."""
    sources = read_sources(root, names, ".py")
    code = {name: text for name, text in sources.items() if not is_test(name)}
    yield from find_odd_functions(sources, read_names(NAMES.read_text(encoding="utf-8")))
    yield from find_long_sentences(read_sources(root, [name for name in names if is_page(name)], ".md"))
    yield from find_long_subjects(root)
    exceeded = find_exceeded_budgets(compute_figures(sources), budgets)
    yield from exceeded
    duplicates = {"duplicate_class_names": find_duplicate_classes, "duplicate_file_names": find_duplicate_files}
    for figure, find in duplicates.items():
        if any(complaint.startswith(figure) for complaint in exceeded):
            yield from (f"  {name}: {', '.join(files)}" for name, files in find(code).items())


def _run_git(root: Path, *arguments: str) -> str | None:
    """Return what git prints; None where it fails or is missing."""
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    """Print every complaint, or with --figures the figures and budgets; return the exit status."""
    names = list_tracked_files(ROOT)
    if names is None:
        print("no git checkout: style is not checked")
        return 0
    budgets = read_budgets(BUDGETS.read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--figures"]:
        for name, figure in compute_figures(read_sources(ROOT, names, ".py")).items():
            print(f"{name:<30} {figure:>8g}  at most {budgets.get(name, 0):g}")
        return 0
    complaints = list(find_complaints(ROOT, names, budgets))
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
