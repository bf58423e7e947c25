"""A child process that measures, for ``bench`` and ``tune``.

A process of its own has a peak of memory of its own, and libgomp reads how patient its threads
are only when it is loaded.
"""

from __future__ import annotations

from typing import Any

from edge_vlm.machine.child import Child


class Worker(Child):
    """A process that measures. What it loaded stays until a request needs it otherwise."""

    def measure(self, name: str, **request: Any) -> dict[str, Any]:
        """Call a method of ``measurements.Measurements``.

        Raises:
            EdgeVLMError: it failed, or the process died.
        """
        task = f"edge_vlm.measure.measurements:MEASUREMENTS.{name}"
        found: dict[str, Any] = self.call(task, **request)
        return found
