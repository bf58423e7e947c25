"""The way of one question through the files, as docs/how-it-works.md tells it."""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import edge_vlm
from edge_vlm import EdgeVLM
from edge_vlm.machine.settings import MachineSettings

ROOT = Path(__file__).parents[2]
PACKAGE = Path(edge_vlm.__file__).parent
PAGE = ROOT / "docs" / "how-it-works.md"
MAX_FILES = 25


@pytest.fixture
def vlm(tmp_path: Path) -> Iterator[EdgeVLM]:
    """The demo model with both engines in memory, and nothing in its cache."""
    settings = MachineSettings(cache=tmp_path / "cache", kv_type="f16")
    with EdgeVLM.load("demo", settings=settings) as model:
        model.engine.vision.load()
        yield model


def files_run(work: Callable[[], Any]) -> list[str]:
    """Files of edge_vlm of which a function runs, in the order in which they come in."""
    found: dict[str, None] = {}

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code  # of a function: those of modules and classes are not optimized
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:
            path = Path(code.co_filename)
            if path.is_relative_to(PACKAGE):
                found.setdefault(path.relative_to(PACKAGE).as_posix())

    before = sys.getprofile()
    threading.setprofile(on_event)
    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    return list(found)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere llama.cpp has no libgomp to wait in")
def test_a_question_passes_the_files_that_the_page_lists(vlm: EdgeVLM) -> None:
    picture = ROOT / "examples" / "images" / "receipt-1.png"
    run = files_run(lambda: vlm.ask(picture, "What is the total?"))
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(listed) - set(run) == set(), "the page lists them, and they do not run"
    assert set(run) - set(listed) == set(), "they run, and the page does not list them"
    assert listed == run
    assert len(run) <= MAX_FILES


def test_the_files_that_run_are_found() -> None:
    from edge_vlm.machine.settings import parse_size

    assert files_run(lambda: parse_size("1MB")) == ["machine/settings.py"]
    assert files_run(lambda: None) == []
