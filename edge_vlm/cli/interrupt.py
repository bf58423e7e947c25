"""Ctrl-C and SIGTERM during work in native libraries.

Python handles a signal only between its own instructions, so a main thread inside llama.cpp or
onnxruntime would not notice Ctrl-C for seconds. The work therefore runs in a thread of its own
while the main thread waits for its events.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from edge_vlm.cli.display import Display
from edge_vlm.cli.streams import say
from edge_vlm.progress import CancelToken, OnProgress, Progress

Work = Callable[[CancelToken, OnProgress], Iterator[Any]]
_END = object()
_PATIENCE_SECONDS = 1.0
_POLL_SECONDS = 0.1  # on Windows, a wait without end would hold back Ctrl-C


class Terminated(SystemExit):
    """Someone asked the process to end."""


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM, or the terminal's end, raises ``Terminated``: what is half done is taken back.

    A second one ends the process at once.
    """

    def on_signal(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated(128 + number)

    ours = []
    if threading.current_thread() is threading.main_thread():
        wanted = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        ours = [n for n in wanted if n and signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


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


def run_interruptibly(work: Work, cancel: CancelToken | None = None) -> Iterator[Any]:
    """Iterate over ``work(cancel, progress)`` in a thread; show its progress, yield the rest.

    Ctrl-C, SIGTERM, or closing the generator, sets ``cancel`` and gives the work a second to end;
    if it cannot (a model is being loaded), or at a second Ctrl-C, the process ends at once. What
    the work raises is raised here.
    """
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    cancel = cancel or CancelToken()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            for event in work(cancel, events.put):
                events.put(event)
        except BaseException as error:  # carried to the main thread
            failure.append(error)
        finally:
            events.put(_END)

    thread = threading.Thread(target=run, name="edge-vlm work", daemon=True)
    thread.start()
    display = Display()
    try:
        while (event := _next(events)) is not _END:
            if isinstance(event, Progress):
                display.show_stage(event)
            else:
                display.hide()
                yield event
    except BaseException as error:
        cancel.set()
        _stop(thread, error.code if isinstance(error, Terminated) else 130)
        raise
    finally:
        display.hide()
    thread.join()
    if failure:
        raise failure[0]


def _next(events: queue.SimpleQueue[Any]) -> Any:
    while True:
        with contextlib.suppress(queue.Empty):
            return events.get(timeout=_POLL_SECONDS)


def _stop(thread: threading.Thread, code: Any) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(_POLL_SECONDS)
    except KeyboardInterrupt:
        pass
    if thread.is_alive():
        # Not an orderly exit, which would free memory under native threads that still run.
        say("stopped")
        os._exit(code)
