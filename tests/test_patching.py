"""Tests replace nothing of the code under test, only what is outside of it.

What a test has to decide is a parameter, a setting or a file; a clock, a disk or an engine that
misbehaves is the standard library's, another library's or one that is passed in. So a name inside
the project can change without a test that knows it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OURS = {"edge_vlm", "edge_vlm_export", "models", "tests"}
PATCHES = {"setattr", "delattr", "patch", "object"}  # of pytest's monkeypatch, and of mock


def imports(tree: ast.Module) -> dict[str, str]:
    """Packages by the name that something of them has in this file."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = (node.module or "").split(".")[0]
    return found


def owner(target: ast.expr, known: dict[str, str]) -> str | None:
    """The package whose name is replaced; None if the file does not tell."""
    while isinstance(target, ast.Attribute | ast.Call | ast.Subscript):
        target = target.func if isinstance(target, ast.Call) else target.value
    if isinstance(target, ast.JoinedStr):
        target = target.values[0]
    if isinstance(target, ast.Constant) and isinstance(target.value, str):
        return target.value.split(".")[0]
    return known.get(target.id) if isinstance(target, ast.Name) else None


def replaced(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines that replace a name of the project, or of something that is not named there."""
    known = imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in PATCHES and (package := owner(node.args[0], known)) in {*OURS, None}:
                yield node.lineno, f"{called} replaces a name of {package or 'what?'}"
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            for target in targets:
                if isinstance(target, ast.Attribute) and owner(target, known) in OURS:
                    yield node.lineno, "an attribute of the project is assigned"


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS))
)
def test_nothing_of_the_project_is_replaced(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [f"{path.name}:{line}: {why}" for line, why in replaced(tree)]


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ('monkeypatch.setattr("edge_vlm.decoder.llama.api", 1)', True),
        ('monkeypatch.setattr(f"edge_vlm.{name}", 1)', True),
        ('from edge_vlm.machine import store\npatch.setattr(store, "MAX", 1)', True),
        ('from edge_vlm.machine.store import Store\npatch.setattr(Store, "_lock", 1)', True),
        ('import edge_vlm.errors as e\nmock.patch.object(e.EdgeVLMError, "exit_code", 3)', True),
        ("from edge_vlm.machine import store\nstore.MAX = 1", True),
        ('patch.setattr(vlm, "ask", 1)', True),
        ('import os\npatch.setattr(os, "fsync", 1)', False),
        ('patch.setattr("psutil.cpu_count", 1)', False),
        ('import logging\npatch.setattr(logging.getLogger("edge_vlm"), "propagate", 0)', False),
        ("thing.attribute = 1", False),
    ],
)
def test_what_counts_as_replacing(code: str, is_found: bool) -> None:
    assert bool(list(replaced(ast.parse(code)))) is is_found
