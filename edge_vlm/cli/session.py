"""One run of a command line: how much it says, and what the library logged meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import io
    import logging


class Session:
    """The ``obj`` of every click context. It holds log lines back: an answer is not interrupted."""

    def __init__(self) -> None:
        self.verbose = False
        self._held: tuple[logging.StreamHandler[io.StringIO], int] | None = None

    def listen(self, verbose: bool) -> None:
        """Hold back what is logged from now on: warnings, if ``verbose`` also what is less urgent.

        Details of errors are shown if ``verbose``.
        """
        import io
        import logging

        self.finish()
        self.verbose = verbose
        logger = logging.getLogger("edge_vlm")
        self._held = logging.StreamHandler(io.StringIO()), logger.level
        logger.addHandler(self._held[0])
        logger.setLevel(logging.INFO if verbose else logging.WARNING)

    def finish(self) -> None:
        """Print what was held back to stderr."""
        if self._held is None:
            return
        import logging

        (handler, level), self._held = self._held, None
        logger = logging.getLogger("edge_vlm")
        logger.removeHandler(handler)
        logger.setLevel(level)
        click.echo(handler.stream.getvalue(), err=True, nl=False)


def session() -> Session:
    """That of the command that runs."""
    return click.get_current_context().ensure_object(Session)
