"""How long llama.cpp's threads wait for each other before they sleep.

Most builds of llama.cpp use libgomp. Its threads meet at hundreds of barriers a token, and there
they first wait actively, then sleep. To sleep costs a tenth of the speed and more where waking up
takes long, as on virtual machines; to wait actively beside another program keeps a core from the
very thread that is waited for, which can cost nine tenths. So threads wait actively as long as the
cores are ours, and sleep at once while other programs need them.

libgomp reads from its environment, once, how long to wait. What it documents besides: with more
threads than cores it takes 1,000 turns, under 0.1 ms (``GOMP_SPINCOUNT`` in
https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). So a few threads of its own that do
nothing, the crowd, make all others impatient, and they are patient again when these are gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

INTERVAL = 0.2  # seconds between two looks at the machine
_NOTICED = 0.3  # cores that others may take; the clock of Linux has a resolution of 0.05 to 0.1
_QUIET_LOOKS = 2  # in turn, until it is believed


class Times(NamedTuple):
    """Seconds."""

    at: float
    busy: float  # of all programs on the cores that are ours to use
    own: float  # of this process


def times() -> Times:
    """Of the cores that are ours to use.

    Raises:
        OSError, RuntimeError: the system does not tell.
    """
    import psutil

    cores = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):
        cores = [cores[i] for i in os.sched_getaffinity(0) if i < len(cores)]
    names = ("user", "nice", "system", "irq", "softirq")
    busy = sum(getattr(core, name, 0.0) for core in cores for name in names)
    return Times(time.monotonic(), busy, time.process_time())


def taken_by_others(before: Times, now: Times) -> float:
    """Cores that other programs were using between two looks."""
    seconds, busy, own = (b - a for a, b in zip(before, now, strict=True))
    return max(0.0, busy - own) / max(seconds, 1e-3)


class Patience:
    """Watches the machine while llama.cpp works. There is one for a process.

    Args:
        library: llama.cpp's. Without libgomp among what it uses, nothing is ever done.
        look: at the machine; a system that does not tell raises OSError or RuntimeError.
        interval: seconds between two looks.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        look: Callable[[], Times] = times,
        interval: float = INTERVAL,
    ) -> None:
        self._times = look
        self._interval = interval
        self._guard = threading.Lock()
        self._n_working = 0
        self._stop = threading.Event()
        self._crowd: _Crowd | None = None
        self._seen: Times | None = None  # at the last look
        self._is_quiet = True  # as it was then; a wrong guess lasts no longer than to the next one
        self._parallel: Any = getattr(library, "GOMP_parallel", None)
        if self._parallel:
            self._nothing: Any = library.omp_get_level
            self.n_cores = int(library.omp_get_num_procs())
            with contextlib.suppress(OSError, RuntimeError):
                self._seen = self._times()

    @contextlib.contextmanager
    def watching(self, n_threads: int) -> Iterator[None]:
        """While llama.cpp works with so many threads; other calls may overlap."""
        if self._parallel is None or n_threads < 2:
            yield
            return
        with self._guard:
            self._n_working += 1
            if self._n_working == 1:
                self._stop = threading.Event()
                self.set_patient(self._was_quiet(n_threads), n_threads)
                watch = threading.Thread(
                    target=self._watch, args=(n_threads, self._stop), daemon=True
                )
                watch.start()
        try:
            yield
        finally:
            with self._guard:
                self._n_working -= 1
                if not self._n_working:
                    self._stop.set()

    @property
    def is_patient(self) -> bool:
        """Whether threads wait actively now."""
        return self._crowd is None

    def set_patient(self, patient: bool, n_threads: int) -> None:
        """Let go of the crowd, or gather it: enough for ``n_threads`` to be too many."""
        if patient and self._crowd:
            self._crowd.leave()
            self._crowd = None
        elif not patient and not self._crowd and n_threads <= self.n_cores:
            self._crowd = _Crowd(self._parallel, self._nothing, self.n_cores - n_threads + 2)

    def _was_quiet(self, n_threads: int) -> bool:
        """Whether others left the cores alone since the last look; as then, if that was just now.

        A picture is encoded between two answers, and before the first one.
        """
        try:
            now = self._times()
        except (OSError, RuntimeError):
            return False
        if self._seen is None or now.at < self._seen.at + self._interval:
            self._seen = self._seen or now
            return self._is_quiet
        return self._look(now, n_threads)

    def _look(self, now: Times, n_threads: int) -> bool:
        """Whether others left the cores alone since the last look; this one is kept."""
        spare = max(0, self.n_cores - n_threads)
        before, self._seen = self._seen or now, now
        self._is_quiet = taken_by_others(before, now) <= spare + _NOTICED
        return self._is_quiet

    def _watch(self, n_threads: int, stop: threading.Event) -> None:
        """Decide again and again; where the system does not tell, nobody gets patient."""
        try:
            self._decide(n_threads, stop)
        except (OSError, RuntimeError):  # psutil's, without a readable /proc/stat for example
            with self._guard:
                self.set_patient(False, n_threads)

    def _decide(self, n_threads: int, stop: threading.Event) -> None:
        n_quiet = 0
        while not stop.wait(self._interval):
            now = self._times()
            with self._guard:
                if stop.is_set():
                    return
                n_quiet = n_quiet + 1 if self._look(now, n_threads) else 0
                if not n_quiet or n_quiet >= _QUIET_LOOKS:
                    self.set_patient(n_quiet > 0, n_threads)


class _Crowd:
    """Threads of libgomp that do nothing; they go when the one that called them ends."""

    def __init__(self, parallel: Any, nothing: Any, n_threads: int) -> None:
        self._left = threading.Event()
        here = threading.Event()

        def gather() -> None:
            address = ctypes.cast(nothing, ctypes.c_void_p)
            zero = ctypes.c_uint(0)
            parallel(address, ctypes.c_void_p(), ctypes.c_uint(n_threads), zero)
            here.set()
            self._left.wait()

        threading.Thread(target=gather, daemon=True).start()
        here.wait()

    def leave(self) -> None:
        """End them."""
        self._left.set()
