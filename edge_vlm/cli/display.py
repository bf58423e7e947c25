"""Progress on stderr, on a terminal only."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from edge_vlm.cli.streams import say
from edge_vlm.errors import harmless

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from edge_vlm.progress import Progress

_LABELS = {"verify": "checking the model", "vision": "looking", "prefill": "reading"}


class Steps:
    """Bars for named steps of long work, each with what is done of it and an estimate."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._step: str | None = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.hide()

    def say(self, text: str) -> None:
        """Write lines to stderr, above the bars."""
        if self._bars:
            self._bars.console.print(harmless(text), markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def show(self, step: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` of a step are done."""
        if not sys.stderr.isatty():
            return
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if step != self._step:
            self._bars.add_task(harmless(step), total=total)
            self._step = step
        self._bars.update(self._bars.task_ids[-1], completed=done, total=total or None)

    def hide(self) -> None:
        """Remove the bars."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._step = None


class Display(Steps):
    """One bar at a time for what comes before an answer."""

    def show_stage(self, progress: Progress) -> None:
        """Show one stage's progress."""
        label = _LABELS.get(progress.stage)
        if label != self._step:
            self.hide()
        if label:
            self.show(label, progress.done, progress.total)


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=Console(stderr=True),  # honours NO_COLOR
        transient=True,
    )
