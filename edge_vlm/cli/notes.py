"""What the library logs, shown after the answer instead of in the middle of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import click


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextlib.contextmanager
def notes(verbose: bool) -> Iterator[None]:
    """Print warnings to stderr at the end, with ``verbose`` also what is less urgent."""
    logger = logging.getLogger("edge_vlm")
    handler = _Notes()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        for line in handler.lines:
            click.echo(line, err=True)
