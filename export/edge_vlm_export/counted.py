"""Progress of an export: its steps, counted."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # step, done, total; bytes where files are written


class Counted:
    """One step: counts what is done and reports it."""

    def __init__(self, name: str, total: int, progress: Progress | None) -> None:
        self.name = name
        self.total = total
        self.progress = progress
        self.done = 0
        self.reach(0)

    def __call__(self, n: int) -> None:
        """Report ``n`` more."""
        self.reach(self.done + n)

    def reach(self, done: int, total: int = 0) -> None:
        """Report ``done`` in all, of a total that may have grown."""
        self.done = done
        self.total = max(self.total, total, done)
        if self.progress is not None:
            self.progress(self.name, self.done, self.total)
