"""How much memory this process took, and what the system has."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from contextlib import suppress


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # getrusage's value starts with the size of the process that started this one.
        with suppress(OSError, StopIteration, ValueError), open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def available_bytes() -> int:
    """Memory that a process can take now without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def give_back_memory() -> None:
    """Let the C library return what was freed to the system; only glibc keeps much of it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
