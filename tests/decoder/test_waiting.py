"""Threads of llama.cpp wait actively for each other only while no other program needs the cores."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from edge_vlm.decoder.waiting import Patience, Times, taken_by_others, times

# CPU seconds that a thread takes within 0.2 s of having nothing to do, by who is patient.
SCRIPT = """
import ctypes, json, os, time
from edge_vlm.decoder import llama
made = llama.load(False)
assert not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
found = []
if made is not None and made._parallel and made.n_cores > 1:
    nothing = ctypes.cast(made._nothing, ctypes.c_void_p)
    for patient in (True, False, True):
        made.set_patient(patient, 2)
        assert made.is_patient == patient
        time.sleep(0.1)  # threads that leave take a moment
        made._parallel(nothing, ctypes.c_void_p(), ctypes.c_uint(2), ctypes.c_uint(0))
        started = time.process_time()
        time.sleep(0.2)
        found.append(time.process_time() - started)
print(json.dumps(found))
"""


@pytest.mark.engine
def test_who_waits_actively() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, check=True, timeout=60
    )
    found = json.loads(done.stdout)
    if not found:
        pytest.skip("this llama.cpp does not use libgomp, or there is one core")
    patient, impatient, again = found
    assert impatient < 0.02
    assert min(patient, again) > 2 * impatient + 0.02


class Library:
    """As much of libgomp as is asked for."""

    def __init__(self) -> None:
        self.n_cores = 4
        self.crowds: list[int] = []

    def GOMP_parallel(  # noqa: N802 (libgomp's name)
        self, _function: Any, _data: Any, n_threads: Any, _flags: Any
    ) -> None:
        self.crowds.append(n_threads.value)

    @property
    def omp_get_level(self) -> Any:
        return ctypes.CFUNCTYPE(None)(lambda: None)

    def omp_get_num_procs(self) -> int:
        return self.n_cores


def looks(*others: float) -> Iterator[Times]:
    """Of a machine where other programs take so many cores, one second each."""
    now = busy = own = 0.0
    for _ in ("loaded", "at work"):
        yield Times(now, busy, own)
    for taken in others:
        now, busy, own = now + 1, busy + taken + 2, own + 2
        yield Times(now, busy, own)


@pytest.mark.parametrize(
    ("n_threads", "others", "expected"),
    [
        (4, [0.0, 0.0], [True, True]),
        (4, [1.0, 0.0, 0.0, 0.1], [False, False, True, True]),  # one quiet look is not enough
        (4, [0.0, 0.0, 0.9, 0.0], [True, True, False, False]),
        (2, [1.9, 2.6, 1.9, 1.9], [True, False, False, True]),  # two cores are left over
    ],
)
def test_others_are_noticed(n_threads: int, others: list[float], expected: list[bool]) -> None:
    library: Any = Library()
    seen: list[bool] = []
    all_seen = threading.Event()
    source = looks(*others)

    def look() -> Times:
        if (found := next(source, None)) is None:
            seen.append(made.is_patient)
            all_seen.set()
            return Times(1e9, 0.0, 0.0)
        if found.at > 1:
            seen.append(made.is_patient)
        return found

    made = Patience(library, look, interval=0.001)
    with made.watching(n_threads):
        assert all_seen.wait(10)
    assert seen[: len(expected)] == expected
    # More than cores, with those at work.
    assert set(library.crowds) == ({4 - n_threads + 2} if False in expected else set())


@pytest.mark.parametrize(("taken", "part"), [(0.1, 5.0), (0.9, 5.0), (0.0, 0.25), (0.9, 0.25)])
def test_what_was_before_counts(taken: float, part: float) -> None:
    """For the first moment; what is too short to tell leaves it as it was, at first patient."""
    interval = 1000.0  # so that nobody looks again meanwhile
    seconds = part * interval
    now = Times(0.0, 0.0, 0.0)
    library: Any = Library()
    made = Patience(library, lambda: now, interval)
    now = Times(seconds, (2 + taken) * seconds, 2 * seconds)
    with made.watching(4):
        assert made.is_patient == (seconds < interval or taken < 0.3)
    before = made.is_patient
    with made.watching(4):  # at once
        assert made.is_patient == before


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def refuse() -> Times:
        asked.set()
        raise PermissionError("/proc/stat")

    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    library: Any = Library()
    made = Patience(library, refuse)
    with made.watching(4):
        assert asked.wait(10)
    assert not made.is_patient
    assert not failed


def test_what_has_no_libgomp_or_one_thread_is_left_alone() -> None:
    class Nothing:
        pass

    without: Any = Nothing()
    with Patience(without).watching(4):
        pass
    library: Any = Library()
    with Patience(library).watching(1):
        pass
    assert not library.crowds


def test_the_machine_is_read() -> None:
    before = times()
    sum(range(10**6))
    now = times()
    assert all(b >= a for a, b in zip(before, now, strict=True))
    assert taken_by_others(Times(0, 0, 0), Times(2, 3, 1)) == 1
    assert taken_by_others(Times(0, 0, 0), Times(1, 1, 1.1)) == 0
