"""The package is as docs/architecture.md draws it: arrows one way, no circle, nothing twice."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hesskern"
MAP = ROOT / "docs" / "architecture.md"
# Written above folders: the modules that stand in none.
TOP = "(top)"
FACE = "hesskern"


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package by its folder's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(source: str, known: set[str]) -> set[str]:
    """The package's modules that a module's source imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports name their module in full"
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                found.add(longer if longer in known else node.module)
    return {name for name in found if name.split(".")[0] == FACE} & known


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path.read_text(), set(known)) for name, path in known.items()}


def folder(module: str) -> str:
    parts = module.split(".")
    if module in (FACE, f"{FACE}.__main__"):
        return FACE
    return parts[1] if (PACKAGE / parts[1]).is_dir() else TOP


def table() -> dict[str, set[str]]:
    """What each folder may import, as the map's table says."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", MAP.read_text(), re.MULTILINE)
    return {name.rstrip("/"): set(re.findall(r"`([^`]+?)/?`", allowed)) for name, allowed in rows}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Names along one circle of arrows, or none."""
    state: dict[str, int] = {}
    trail: list[str] = []

    def walk(name: str) -> list[str]:
        state[name] = 1
        trail.append(name)
        for other in sorted(edges.get(name, ())):
            if state.get(other) == 1:
                return trail[trail.index(other) :]
            if other not in state and (found := walk(other)):
                return found
        state[name] = 2
        trail.pop()
        return []

    for name in sorted(edges):
        if name not in state and (found := walk(name)):
            return found
    return []


class TestTheReaders:
    """What the tests below lean on sees what it should."""

    def test_imports(self) -> None:
        known = {"hesskern", "hesskern.a", "hesskern.a.b", "hesskern.c"}
        source = """
import hesskern.c
from hesskern.a import b
from hesskern.a.b import something
def later():
    from hesskern import other
import torch
"""
        assert imports(source, known) == {"hesskern.c", "hesskern.a.b", "hesskern"}

    def test_circles(self) -> None:
        assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
        assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]

    def test_equal_runs(self) -> None:
        lines = [f"value_{i} = compute({i})" for i in range(12)]
        assert equal_runs({"a": ["x", *lines], "b": [*lines, "y"]}) == [("a", "b", lines[0])]
        assert equal_runs({"a": lines, "b": lines[:11]}) == []


class TestArrows:
    def test_no_circle(self) -> None:
        assert circle(graph()) == []

    def test_they_run_as_the_map_says(self) -> None:
        allowed = table()
        wrong = [
            f"{name} imports {other}"
            for name, others in graph().items()
            for other in sorted(others)
            if folder(name) not in (folder(other), FACE)
            and folder(other) not in allowed[folder(name)]
        ]
        assert wrong == []

    def test_the_map_draws_no_circle(self) -> None:
        assert circle({name: others - {FACE} for name, others in table().items()}) == []

    def test_the_map_names_every_folder(self) -> None:
        folders = {folder(name) for name in modules()} - {FACE}
        assert set(table()) == folders

    def test_every_arrow_of_the_map_is_there(self) -> None:
        drawn = {(name, other) for name, others in table().items() for other in others}
        there = {(folder(a), folder(b)) for a, others in graph().items() for b in others}
        assert drawn - there == set()

    def test_few_modules_stand_in_no_folder(self) -> None:
        assert len(list(PACKAGE.glob("*.py"))) <= 12


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_path_that_a_map_names_is_there(page: str) -> None:
    path = r"`([\w./*-]+/[\w./*-]*|[\w-]+\.(?:py|md|toml|txt))`"
    named = re.findall(path, (ROOT / page).read_text())
    assert len(named) > 10
    bases = (ROOT, PACKAGE, ROOT / "csrc")
    missing = [
        path for path in named if not any(list(base.glob(path.rstrip("/"))) for base in bases)
    ]
    assert missing == []


def test_no_test_file_imports_another() -> None:
    # Folders of tests are no packages: such an import holds in some orders of running them alone.
    wrong = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.match(r"\s*(from|import) test_", line)
    ]
    assert wrong == []


# Where sources are alike on purpose: one file a SIMD level, each compiled with its own flags.
VARIANTS = re.compile(r"csrc/cpu/.*(avx|simd)")
RUN = 12


def meaningful(path: Path) -> list[str]:
    """The lines that say something: no blanks, comments, imports, brackets alone."""
    kept = []
    for line in path.read_text().splitlines():
        text = line.strip()
        if len(text) > 3 and not re.match(r"(#|//|\*|import |from |using |namespace )", text):
            kept.append(text)
    return kept


def equal_runs(files: dict[str, list[str]]) -> list[tuple[str, str, str]]:
    """(file, file, first line) where ``RUN`` lines are equal, once for every two files."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    found: dict[tuple[str, str], str] = {}
    for name, lines in files.items():
        for i in range(len(lines) - RUN + 1):
            run = tuple(lines[i : i + RUN])
            for other in places[run]:
                found.setdefault((other, name), run[0])
            places[run].append(name)
    return [(a, b, line) for (a, b), line in found.items()]


def sources() -> Iterator[Path]:
    for pattern in ("hesskern/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu"):
        yield from sorted(ROOT.glob(pattern))


def test_no_twelve_lines_stand_twice() -> None:
    files = {
        path.relative_to(ROOT).as_posix(): meaningful(path)
        for path in sources()
        if not VARIANTS.search(path.relative_to(ROOT).as_posix())
    }
    assert equal_runs(files) == []
