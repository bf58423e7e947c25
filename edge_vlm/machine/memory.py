"""How much memory this process took, and what the system has."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

_MADV_DONTNEED = 4  # of Linux


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
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def can_forget() -> bool:
    """Whether ``forget_mapped`` does anything here."""
    return sys.platform == "linux"


def forget_mapped(path: Path) -> None:
    """Let go of the pages of a mapped file; those that are read come back from the page cache.

    llama.cpp makes all of a file resident when it opens it. Of the token table, an eighth of a
    decoder with a head of its own, a prompt reads a few rows; the head itself is first read when
    the prompt's KV cache is done; nothing is read while a picture is encoded; and matrices that
    are interleaved are never read again. Linux alone; elsewhere nothing happens. The file must stay
    mapped meanwhile: what took its place would be lost.
    """
    if not can_forget():
        return
    name = str(path.resolve())
    with suppress(OSError, AttributeError, ValueError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] == name and fields[1].startswith("r-"):
                start, end = (int(value, 16) for value in fields[0].split("-"))
                madvise(start, end - start, _MADV_DONTNEED)
