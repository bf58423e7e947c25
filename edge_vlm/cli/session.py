"""One run of a command line: how much it says, and what the library logged meanwhile."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import click


class Session(logging.Handler):
    """The ``obj`` of every click context. It holds log lines back: an answer is not interrupted."""

    def __init__(self) -> None:
        super().__init__()
        self.verbose = False
        self._lines: list[str] = []

    def be_verbose(self) -> None:
        """Also show what is less urgent than a warning, and details of errors."""
        self.verbose = True
        logging.getLogger("edge_vlm").setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._lines.append(self.format(record))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Print what was logged to stderr at the end."""
        logger = logging.getLogger("edge_vlm")
        level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            for line in self._lines:
                click.echo(line, err=True)


def session() -> Session:
    """That of the command that runs."""
    return click.get_current_context().ensure_object(Session)
