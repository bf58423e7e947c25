"""Progress on stderr, on a terminal only."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from edge_vlm.progress import Progress

_LABELS = {"verify": "checking the model", "vision": "looking", "prefill": "reading"}


class Display:
    """Bars with an estimate; they vanish when the answer begins."""

    def __init__(self) -> None:
        self._enabled = sys.stderr.isatty()
        self._bars: Bars | None = None
        self._stage: str | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.hide()

    def show(self, progress: Progress) -> None:
        """Show one stage's progress."""
        if not self._enabled or progress.stage not in _LABELS:
            return
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if self._stage != progress.stage:
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._bars.add_task(_LABELS[progress.stage], total=progress.total)
            self._stage = progress.stage
        self._bars.update(self._bars.task_ids[-1], completed=progress.done, total=progress.total)

    def hide(self) -> None:
        """Remove the bars."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._stage = None


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=Console(stderr=True),  # honours NO_COLOR
        transient=True,
    )


class Steps:
    """Bars for named steps of long work, each with bytes done and an estimate."""

    def __init__(self) -> None:
        self._bars = _bars() if sys.stderr.isatty() else None
        self._stage: str | None = None

    def __enter__(self) -> Steps:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Write lines to stderr, above the bars."""
        if self._bars:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(f"{text}\n")

    def show(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` of a step are done."""
        if not self._bars:
            return
        if stage != self._stage:
            self._bars.add_task(stage, total=total)
            self._stage = stage
        self._bars.update(self._bars.task_ids[-1], completed=done, total=total or None)
