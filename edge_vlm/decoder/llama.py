"""llama.cpp in this process: loaded once, and what its functions need to be given.

llama-cpp-python's low-level functions mirror ``llama.h`` of the pinned release.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from edge_vlm.decoder.waiting import Patience
from edge_vlm.machine.memory import forget_mapped
from edge_vlm.machine.process import llama_log, long_waits, waits_are_decided

_FORGET_EVERY = 1 / 32  # of a file that is loaded


def load(spinning: bool) -> Patience | None:
    """Load llama.cpp so that how long its threads wait can be changed, and who changes it.

    None, if they are to spin always or the user has decided. The first call counts: see
    ``patience``.
    """
    if spinning or waits_are_decided():
        return None
    with long_waits():
        import llama_cpp  # noqa: F401 (loaded here for what libgomp reads)
    return _patience()


@cache
def api() -> Any:
    """llama-cpp-python's low-level module with its backend started."""
    import llama_cpp

    module = llama_cpp.llama_cpp
    module.llama_log_set(llama_log, ctypes.c_void_p())
    module.llama_backend_init()
    return module


def build_info() -> tuple[str, bool]:
    """llama.cpp's own description of its build, and whether it can use a GPU."""
    text = api().llama_print_system_info().decode("utf-8", "replace")
    return text, bool(api().llama_supports_gpu_offload())


def ggml_type(name: str) -> int:
    """The number of a tensor type."""
    return int(getattr(api(), f"GGML_TYPE_{name.upper()}"))


def load_model(path: Path, params: Any, *, mapped: bool) -> Any:
    """llama.cpp's model; None if it refuses. What it has read of a ``mapped`` file is let go of.

    Matrices that are interleaved are copied, one after the other; otherwise copies and file would
    count together before the last one is done. llama.cpp works in a thread of its own, because
    Ctrl-C raises in the main thread, and a callback from C cannot pass that on. It ends the load.
    """
    stopped = threading.Event()
    forgotten = -1.0

    def on_progress(done: float, _user_data: object) -> bool:
        nonlocal forgotten
        if mapped and (done == 1 or done >= forgotten + _FORGET_EVERY):
            forgotten = done
            forget_mapped(path)
        return not stopped.is_set()

    params.progress_callback = api().llama_progress_callback(on_progress)
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(
                api().llama_model_load_from_file, str(path).encode(), params
            ).result()
        except BaseException:
            stopped.set()
            raise


@cache
def abort_when_set() -> Any:
    """An abort callback without Python in it, for a ``CancelToken``'s buffer.

    llama.cpp asks it before every operator, from its own threads; a Python function would take the
    interpreter's lock thousands of times a second. strlen() of a token's buffer is 0 until the
    token is set and 1 afterwards, which is just what the callback has to answer.
    """
    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return ctypes.cast(libc.strlen, api().ggml_abort_callback)


@cache
def never_abort() -> Any:
    """No abort callback."""
    return api().ggml_abort_callback()


@cache
def _patience() -> Patience:
    return Patience(api()._lib)
