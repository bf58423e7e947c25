"""What is one for the whole process: variables that libraries read when they are loaded, and
llama.cpp's log. Nothing else in the package changes the process.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

_OMP = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "10000000"}  # about half a second
_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR


def import_onnxruntime() -> Any:
    """The onnxruntime module, its telemetry off.

    Since 2026 the released packages for Linux and macOS write a device id into the user's cache
    folder and send events to Microsoft unless ``ORT_DISABLE_TELEMETRY`` is set before they are
    loaded (https://github.com/microsoft/onnxruntime/pull/27379); on Windows events go to the
    system until they are switched off.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("ORT_TELEMETRY_DISABLED", "1")  # the name in releases before
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime


def waits_are_decided() -> bool:
    """Whether the user has told libgomp how long threads wait for each other."""
    return not _OMP.keys().isdisjoint(os.environ)


@contextlib.contextmanager
def long_waits() -> Iterator[None]:
    """For libgomp, if it is loaded meanwhile; not for the processes that this one starts."""
    os.environ.update(_OMP)
    try:
        yield
    finally:
        for name in _OMP:
            del os.environ[name]


def set_logs(enabled: bool) -> None:
    """Whether llama.cpp's log is printed."""
    global _print_logs
    _print_logs = enabled


def forget_errors() -> None:
    """Before a call, for ``because``."""
    _recent_errors.clear()


def because() -> str:
    """The first error that was logged since they were forgotten, as the end of a message."""
    return f": {_recent_errors[0]}" if _recent_errors else ""


@contextlib.contextmanager
def hearing_llama() -> Iterator[None]:
    """llama.cpp's log comes here meanwhile, and then to whoever had it before."""
    import llama_cpp

    receiver, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(receiver), ctypes.byref(user_data))
    llama_cpp.llama_log_set(llama_log, ctypes.c_void_p())
    try:
        yield
    finally:
        llama_cpp.llama_log_set(receiver, user_data)


_recent_errors: collections.deque[str] = collections.deque(maxlen=8)
_print_logs = False


def _on_log(level: int, text: bytes, _user_data: object) -> None:
    message = text.decode("utf-8", "replace")
    if level == _LOG_ERROR:
        _recent_errors.append(" ".join(message.split())[:300])
    if _print_logs:
        sys.stderr.write(message)


# What llama.cpp is given as its log's receiver.
llama_log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_on_log)
