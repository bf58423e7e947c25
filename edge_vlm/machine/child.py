"""Functions of this program in a process of their own, asked in lines of JSON.

llama.cpp's quantizer is one call of several minutes that nothing can interrupt from within, what
the engines allocate is not always given back, and some of what they read is read once in a
process. Such a process can be ended at any moment, and ends by itself when its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import IO, Any, TypeVar

from edge_vlm.errors import EdgeVLMError

Told = Callable[[int, int], None]  # done, total
_POLL_SECONDS = 0.2  # a wait without end would hold back Ctrl-C on Windows
_START = (
    "import sys; sys.path[:] = sys.argv.pop().splitlines();"
    " from edge_vlm.machine.child import main; main()"
)


_Child = TypeVar("_Child", bound="Child")


class Ended(EdgeVLMError):  # noqa: N818 - named for the event
    """The process ended without an answer, or had none in time (``is_late``); ``how`` in words."""

    def __init__(self, task: str, how: str, *, is_late: bool = False) -> None:
        super().__init__(f"{task}: its process {how}")
        self.how = how
        self.is_late = is_late


class Child:
    """The process, seen from its parent; ``with`` ends it.

    Each call may take ``limit`` seconds.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._limit = limit
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.process = subprocess.Popen(  # noqa: S603 - this interpreter and this package
            [sys.executable, "-c", _START, "\n".join(filter(None, sys.path))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=os.name == "posix",  # Ctrl-C comes to this process alone
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def __enter__(self: _Child) -> _Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._log):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]  # all three are there

    def call(self, task: str, progress: Told | None = None, /, **arguments: Any) -> Any:
        """Call a function and return its result.

        Args:
            task: "module:function", or "module:object.method".
            progress: told what is done and the total; the function gets one like it in front.
            arguments: of the function, as far as JSON can hold them.

        Raises:
            EdgeVLMError: the function raised one.
            Ended: the process ended without an answer, or the time was up.
        """
        started = time.monotonic()
        request = {"task": task, "arguments": arguments, "progress": progress is not None}
        with contextlib.suppress(OSError):  # it is gone: its end says more
            stdin: Any = self.process.stdin
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if self._limit is not None and time.monotonic() - started > self._limit:
                    how = f"was not done within {self._limit:.0f} seconds"
                    raise Ended(task, how, is_late=True) from None
                continue
            if not line:
                raise Ended(task, self._end())
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise EdgeVLMError(message["error"])
            if "result" in message:
                return message["result"]
            if progress:
                progress(*message["progress"])

    def _read(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(ValueError):  # closed by __exit__
            for line in stream:
                self._lines.put(line)
        self._lines.put(b"")

    def _end(self) -> str:
        code = self.process.wait()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        last = "".join(c if c.isprintable() else "?" for c in last[:300])
        return f"ended with code {code}: {last}"


def call_apart(task: str, progress: Told | None = None, /, **arguments: Any) -> Any:
    """``Child.call`` in a process for this one call."""
    with Child() as child:
        return child.call(task, progress, **arguments)


def main() -> None:
    """Answer the requests of a ``Child`` until it is gone."""
    # Nothing that a library prints may come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()

    def send(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    while True:
        request = json.loads(requests.get())
        module, name = request["task"].split(":")
        told = [lambda done, total: send(progress=(done, total))] if request["progress"] else []
        try:
            function = attrgetter(name)(import_module(module))
            send(result=function(*told, **request["arguments"]))
        except EdgeVLMError as error:
            send(error=str(error))
        except MemoryError:
            send(error="not enough memory")


def _listen(requests: queue.SimpleQueue[bytes]) -> None:
    """Unbuffered: a buffered read would hold a lock that the interpreter wants at its end."""
    text = b""
    while data := os.read(0, 1 << 16):
        *lines, text = (text + data).split(b"\n")
        for line in lines:
            requests.put(line)
    os._exit(1)  # the parent is gone
