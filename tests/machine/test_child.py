"""Functions in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_vlm.errors import EdgeVLMError
from edge_vlm.machine.child import Child, call_apart

ROOT = Path(__file__).parents[2]
HERE = "tests.machine.test_child"


def add(told: Callable[[int, int], None], *, numbers: list[int]) -> int:
    """For the child: tells after each number."""
    for done in range(len(numbers)):
        print("this is no answer")
        told(done + 1, len(numbers))
    return sum(numbers)


def refuse() -> None:
    """For the child."""
    raise EdgeVLMError("not today")


def wait(*, note: str) -> None:
    """For the child: longer than any test."""
    Path(note).write_text(str(os.getpid()))
    time.sleep(60)


def test_results_progress_and_errors_come_back() -> None:
    steps: list[tuple[int, int]] = []
    with Child() as child:
        assert child.call(f"{HERE}:add", lambda *step: steps.append(step), numbers=[1, 2, 4]) == 7
        with pytest.raises(EdgeVLMError, match=r"^not today$"):
            child.call(f"{HERE}:refuse")
        assert child.call("os:getpid") == child.process.pid  # the same one, still
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_process_that_dies_is_reported() -> None:
    with pytest.raises(EdgeVLMError, match=r"ended with code .*No module named"):
        call_apart("no_such_module:task")


def test_leaving_ends_the_process() -> None:
    with Child() as child:
        assert child.process.poll() is None
    assert child.process.poll() is not None


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    """Also when the parent has no time to end it."""
    note = tmp_path / "pid"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from edge_vlm.machine.child import call_apart\n"
        f"call_apart({HERE + ':wait'!r}, note={str(note)!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int(note.read_text())
    os.kill(child, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the process still runs")
