"""Long calls into native code, in a process of their own.

llama.cpp's quantizer is one call of several minutes that nothing can interrupt from within, and
what the engines allocate is not always given back. A process can be ended at any moment, and ends
by itself when its parent is gone.
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
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any

from edge_vlm.errors import EdgeVLMError

Report = Callable[[int, int], None]  # done, total
_POLL_SECONDS = 0.2  # a wait without end would hold back Ctrl-C on Windows
_START = (
    "import sys; sys.path[:] = sys.argv.pop().splitlines();"
    " from edge_vlm_export.steps.apart import main; main()"
)


def run_apart(task: str, arguments: dict[str, Any], progress: Report | None = None) -> Any:
    """Run ``task`` ("module:function" of this package) in a process of its own.

    Args:
        task: called as ``function(progress, **arguments)``; what it returns comes back.
        arguments: anything JSON can hold.
        progress: called with what is done and the total.

    Raises:
        EdgeVLMError: the function raised one, or the process ended without an answer.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 - this interpreter and this package
            [sys.executable, "-c", _START, "\n".join(filter(None, sys.path))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=os.name == "posix",  # Ctrl-C comes to this process alone
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        try:
            answer = _converse(process, {"task": task, "arguments": arguments}, progress)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if answer is None:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
            raise EdgeVLMError(
                f"{task}: its process ended early (code {process.returncode}): {last[:300]}"
            )
    if "error" in answer:
        raise EdgeVLMError(answer["error"])
    return answer["result"]


def _converse(
    process: subprocess.Popen[bytes], request: dict[str, Any], progress: Report | None
) -> dict[str, Any] | None:
    """The process's last line; None when it ended without."""
    assert process.stdin is not None  # noqa: S101
    assert process.stdout is not None  # noqa: S101
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read(stream: IO[bytes]) -> None:
        with contextlib.suppress(ValueError):  # closed below
            for line in stream:
                lines.put(line)
        lines.put(b"")

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    with contextlib.suppress(OSError):  # it is gone: its end says more
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    while True:
        try:
            line = lines.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
        if not line:
            process.wait()
            return None
        message: dict[str, Any] = json.loads(line)
        if "progress" not in message:
            return message
        if progress:
            progress(*message["progress"])


def main() -> None:
    """Answer one request of ``run_apart``."""
    # Nothing that a library prints may come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    module, function = request["task"].split(":")
    try:
        task = getattr(import_module(f"edge_vlm_export.{module}"), function)
        result = task(lambda done, total: send(progress=(done, total)), **request["arguments"])
        send(result=result)
    except EdgeVLMError as error:
        send(error=str(error))
    except MemoryError:
        send(error="not enough memory")


def _end_with_parent() -> None:
    while os.read(0, 1):  # a buffered read would hold a lock that the interpreter wants at its end
        pass
    os._exit(1)
