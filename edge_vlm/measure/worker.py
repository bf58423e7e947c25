"""A child process that measures: ``bench`` and ``tune`` talk to it in lines of JSON.

A process of its own has a peak of memory of its own, and libgomp reads how patient its threads
are only when it is loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from edge_vlm.errors import EdgeVLMError


class Worker:
    """The child process, seen from the parent.

    ``with Worker() as worker: worker.call("answer", model=..., ...)``
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edge_vlm.measure.measurements"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )

    def call(self, task: str, **request: Any) -> dict[str, Any]:
        """Run a task, a method of ``measurements.Measurements``.

        Raises:
            EdgeVLMError: it failed, or the process died.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise EdgeVLMError("the measuring process has no pipes")
        try:
            stdin.write(json.dumps({"task": task, **request}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:
            line = ""
        if not line:
            code = self._process.wait()
            raise EdgeVLMError(f"the measuring process ended with code {code}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EdgeVLMError(str(answer["error"]))
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()
