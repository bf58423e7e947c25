"""Ctrl-C during work in native libraries.

Python handles a signal only between its own instructions, so a main thread inside llama.cpp or
onnxruntime would not notice Ctrl-C for seconds. The work therefore runs in a thread of its own
while the main thread waits for its events.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from edge_vlm.progress import CancelToken

Emit = Callable[[str, Any], None]
_PATIENCE_SECONDS = 1.0
_POLL_SECONDS = 0.1  # on Windows, a wait without end would hold back Ctrl-C


@contextlib.contextmanager
def stopping(cancel: CancelToken) -> Iterator[None]:
    """Let the first Ctrl-C set ``cancel`` and do nothing else; a second one is as usual."""
    usual = signal.getsignal(signal.SIGINT)
    if usual in (signal.SIG_IGN, None):  # a background job, or a handler that is not Python's
        yield
        return

    def on_interrupt(*_: object) -> None:
        if cancel.is_set:
            raise KeyboardInterrupt
        cancel.set()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def run_interruptibly(
    work: Callable[[CancelToken, Emit], None], cancel: CancelToken | None = None
) -> Iterator[tuple[str, Any]]:
    """Run ``work(cancel, emit)`` in a thread and yield what it emits.

    Ctrl-C, or closing the generator, sets ``cancel`` and gives the work a second to end; if it
    cannot (a model is being loaded), or at a second Ctrl-C, the process ends at once. What the work
    raises is raised here.
    """
    events: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
    cancel = cancel or CancelToken()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work(cancel, lambda kind, event: events.put((kind, event)))
        except BaseException as error:  # carried to the main thread
            failure.append(error)
        finally:
            events.put(None)

    thread = threading.Thread(target=run, name="edge-vlm work", daemon=True)
    thread.start()
    try:
        while (event := _next(events)) is not None:
            yield event
    except BaseException:
        cancel.set()
        _stop(thread)
        raise
    thread.join()
    if failure:
        raise failure[0]


def _next(events: queue.SimpleQueue[tuple[str, Any] | None]) -> tuple[str, Any] | None:
    while True:
        try:
            return events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue


def _stop(thread: threading.Thread) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(_POLL_SECONDS)
    except KeyboardInterrupt:
        pass
    if thread.is_alive():
        # Not an orderly exit, which would free memory under native threads that still run.
        sys.stderr.write("stopped\n")
        sys.stderr.flush()
        os._exit(130)
