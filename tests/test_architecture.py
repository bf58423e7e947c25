"""The house stays small: chains of imports, rooms, files and functions.

What may import what are contracts in pyproject.toml, which ``lint-imports`` checks.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"edge_vlm": ROOT / "edge_vlm", "edge_vlm_export": ROOT / "export" / "edge_vlm_export"}
MAX_CHAIN = 11  # files
MAX_FILE = 450  # lines
MAX_FUNCTION = 60  # lines from def to its end, docstring included, decorators not
FILES_OF_A_ROOM = range(3, 10)  # besides its __init__

FILES = [path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))]
ROOMS = [path.parent for path in FILES if path.name == "__init__.py"]
ROOMS = [room for room in ROOMS if room not in PACKAGES.values()]


@cache
def imports() -> dict[str, set[str]]:
    """What each file of both packages imports of them, also inside functions; not for typing."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    files = {name for name in graph.modules if not graph.find_children(name)}
    return {name: graph.find_modules_directly_imported_by(name) & files for name in files}


def chains() -> dict[str, list[str]]:
    """The longest chain of imports that begins with each file."""
    known: dict[str, list[str]] = {}
    for name in TopologicalSorter(imports()).static_order():  # what is imported first
        below = [known[imported] for imported in sorted(imports()[name])]
        known[name] = [name, *max(below, key=len, default=[])]
    return known


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of each function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def in_words(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_chain_of_imports_is_long(package: str) -> None:
    longest = max(
        (chain for name, chain in chains().items() if name.startswith(f"{package}.")), key=len
    )
    assert len(longest) <= MAX_CHAIN, f"{len(longest)} files: {' > '.join(longest)}"


def test_the_graph_of_imports_is_that_of_the_files() -> None:
    """Guards the guard: every file is in it, and the way of a picture is more than a few long."""
    assert len(imports()) == len([path for path in FILES if path.name != "__init__.py"])
    assert len(max(chains().values(), key=len)) > 5


@pytest.mark.parametrize("path", FILES, ids=in_words)
def test_files_and_functions_are_short(path: Path) -> None:
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= MAX_FILE
    long = {name: n for name, n in functions(path) if n > MAX_FUNCTION}
    assert not long


@pytest.mark.parametrize("room", ROOMS, ids=in_words)
def test_a_room_has_a_purpose_and_a_few_files(room: Path) -> None:
    source = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
    purpose = ast.get_docstring(source)
    assert purpose
    assert len(purpose.splitlines()) == 1
    files = sorted(path.name for path in room.glob("*.py") if path.name != "__init__.py")
    assert len(files) in FILES_OF_A_ROOM, files
