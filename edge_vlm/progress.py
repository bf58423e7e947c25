"""Watching and stopping work that runs inside a native library."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edge_vlm.errors import Cancelled


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
        self._lock = threading.Lock()
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
