"""Watching, stopping and outliving work that runs inside a native library."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NoReturn
from weakref import WeakSet

from edge_vlm.errors import Cancelled, DecoderError, EdgeVLMError

_EXIT_SECONDS = 5.0  # that the end of the program waits for calls of daemon threads


@dataclass(frozen=True)
class Progress:
    """Work done of one stage, in its own unit."""

    stage: Literal["verify", "vision", "prefill", "decode"]  # bytes, crops, positions, tokens
    done: int
    total: int


OnProgress = Callable[[Progress], None]


class CancelToken:
    """Set from any thread to stop the call it was given to.

    Work stops between two tiles (inside a tile as soon as onnxruntime looks), between two
    operators of the decoder, or between two tokens; the call then raises ``Cancelled``.
    """

    def __init__(self) -> None:
        # One byte that native code can read without Python: 0, or 1 once set.
        self.buffer = ctypes.create_string_buffer(2)
        self._lock = threading.RLock()  # a generator that goes while it is held may forget
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_set(self) -> bool:
        """Whether stopping was asked for."""
        return self.buffer.raw[0] != 0

    def set(self) -> None:
        """Ask to stop."""
        with self._lock:
            self.buffer[0] = b"\x01"
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def check(self) -> None:
        """Raise ``Cancelled`` if stopping was asked for."""
        if self.is_set:
            raise Cancelled("stopped")

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` when set (at once if it is)."""
        with self._lock:
            self._listeners.append(listener)
            already = self.is_set
        if already:
            listener()

    def forget(self, listener: Callable[[], None]) -> None:
        """Undo ``listen``."""
        with self._lock:
            self._listeners.remove(listener)

    @contextlib.contextmanager
    def following(self, other: CancelToken | None) -> Iterator[None]:
        """It is set with the other one, too, if there is one."""
        if other:
            other.listen(self.set)
        try:
            yield
        finally:
            if other:
                other.forget(self.set)


class Life:
    """Of something that any thread may close while calls of it run in others.

    Closing refuses further calls and stops those that run. What is held is freed behind the last of
    them, never under it; nobody waits.

    Args:
        name: what it is, for messages.
        free: called once. It must not keep the owner of this object alive.
        part_of: what it is closed with.
        cancel: of its calls, set when it is closed.

    Raises:
        DecoderError: what it is part of was closed.
    """

    def __init__(
        self,
        name: str,
        free: Callable[[], None] = lambda: None,
        part_of: Life | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        self.cancel = cancel or CancelToken()
        self._name, self._free, self._part_of = name, free, part_of
        self._why = ""  # it is closed
        self._n_calls = 0  # of it and its parts
        self._is_freed = False
        self._parts: WeakSet[Life] = WeakSet()
        if part_of:
            part_of.check()
        with _guard:
            self._why = part_of._why if part_of else ""
            (part_of._parts if part_of else _whole).add(self)

    def check(self) -> None:
        """Raise ``DecoderError`` if it was closed."""
        if self._why:
            self._refuse()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around what uses something that is held.

        Raises:
            DecoderError: it was closed before, or meanwhile.
        """
        with _guard:
            is_open = not self._why
            self._count(int(is_open))
        if not is_open:
            self._refuse()
        try:
            try:
                yield
            finally:
                with _guard:
                    self._count(-1)
                self._free_unused()
        except EdgeVLMError as error:
            if self._why:
                self._refuse(error)
            raise
        self.check()

    def close(self) -> None:
        """Stop its calls, and free what is held, now or behind the last of them."""
        self._stop(f"{self._name} was closed")
        self._free_unused(parts_too=True)

    def _refuse(self, cause: Exception | None = None) -> NoReturn:
        while _is_ending and threading.current_thread().daemon:
            time.sleep(60)  # as all daemon threads do in a moment
        raise DecoderError(self._why) from cause

    def _stop(self, why: str) -> None:
        with _guard:
            self._why = self._why or why
            parts = list(self._parts)
        self.cancel.set()
        for part in parts:
            part._stop(why)

    def _count(self, n: int) -> None:
        self._n_calls += n
        if self._part_of:
            self._part_of._count(n)

    def _free_unused(self, parts_too: bool = False) -> None:
        """To free a part is a call of the whole, which goes after it."""
        if parts_too:
            with _guard:
                parts = list(self._parts)
            for part in parts:
                part._free_unused(parts_too)
        whole = self._part_of
        with _guard:
            if not self._why or self._n_calls or self._is_freed or _is_ending:
                return
            self._is_freed = True
            if whole:
                whole._count(1)
        try:
            self._free()
        finally:
            if whole:
                with _guard:
                    whole._count(-1)
                whole._free_unused()


_guard = threading.RLock()  # of all lives, for moments
_whole: WeakSet[Life] = WeakSet()  # those that are no part of another
_is_ending = False


def _in_child() -> None:
    """After a fork: calls of threads that did not come along never end, and hold no lock."""
    global _guard
    _guard = threading.RLock()
    _whole.clear()


@atexit.register
def _at_exit() -> None:
    """Stop the calls of daemon threads, and let them end: a library cannot go under a call.

    Nothing is freed any more; the system does that.
    """
    global _is_ending
    _is_ending = True
    lives = list(_whole)
    for life in lives:
        life._stop("the program is ending")
    until = time.monotonic() + _EXIT_SECONDS
    while any(life._n_calls for life in lives) and time.monotonic() < until:
        time.sleep(0.005)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
