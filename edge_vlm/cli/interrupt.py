"""Ctrl-C during work in native libraries.

Python handles a signal only between its own instructions, so a main thread inside llama.cpp or
onnxruntime would not notice Ctrl-C for seconds. The work therefore runs in a thread of its own
while the main thread waits for its events.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from edge_vlm.cancel import CancelToken

Emit = Callable[[str, Any], None]
_POLL_SECONDS = 0.1  # on Windows, a wait without end would hold back Ctrl-C


def run_interruptibly(work: Callable[[CancelToken, Emit], None]) -> Iterator[tuple[str, Any]]:
    """Run ``work(cancel, emit)`` in a thread and yield what it emits.

    Ctrl-C, or closing the generator, sets ``cancel`` and waits for the work to end; a second Ctrl-C
    ends the process at once. What the work raises is raised here.
    """
    events: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
    cancel = CancelToken()
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
        _join(thread)
        raise
    _join(thread)
    if failure:
        raise failure[0]


def _next(events: queue.SimpleQueue[tuple[str, Any] | None]) -> tuple[str, Any] | None:
    while True:
        try:
            return events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue


def _join(thread: threading.Thread) -> None:
    try:
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
    except KeyboardInterrupt:
        os._exit(130)  # native threads still run: an orderly exit would free memory under them
