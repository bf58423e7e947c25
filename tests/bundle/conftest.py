"""The toy model's bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy.bundle import write_toy_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return write_toy_bundle(tmp_path / "bundle")
