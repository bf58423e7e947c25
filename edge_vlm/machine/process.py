"""What is one for the whole process: variables that libraries read when they are loaded,
llama.cpp's log, stderr, and what does not survive a fork. Nothing else in the package changes the
process.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from edge_vlm.errors import DecoderError, harmless

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
    if _print_logs and sys.stderr:
        sys.stderr.write(harmless(message))


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """What native code of the whole process writes to stderr meanwhile is lost."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


# What llama.cpp is given as its log's receiver.
llama_log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_on_log)


_worked_in: int | None = None  # the process that has the engines' threads
_kept: WeakSet[Any] = WeakSet()


def check_fork() -> None:
    """Refuse what would wait for ever for threads of OpenMP, which a fork leaves behind.

    Raises:
        DecoderError: this process was forked off one in which an engine had worked.
    """
    if _worked_in not in (None, os.getpid()):
        raise DecoderError(
            "this process was forked off one that had used a model, and a model's threads stay"
            ' behind: start it by spawn (multiprocessing.get_context("spawn"), gunicorn without'
            " --preload, celery --pool=solo or threads), or fork before the first question"
        )


def note_work() -> None:
    """An engine works: from now on it has threads here.

    Raises:
        DecoderError: as ``check_fork``.
    """
    global _worked_in
    check_fork()
    _worked_in = os.getpid()


def keep_in_children(thing: Any) -> Any:
    """The same thing, which a forked child never destroys: that would wait for its threads."""
    _kept.add(thing)
    return thing


def _in_child() -> None:
    for thing in _kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
