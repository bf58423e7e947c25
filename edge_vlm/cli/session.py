"""One run of a command line: how much it says, what the library logged, what went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge_vlm.cli.streams import say, say_error
from edge_vlm.errors import EdgeVLMError

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
        if held := handler.stream.getvalue():
            say(held, end="")

    def report(self, error: Exception) -> int:
        """Say an error in one line, and more if ``verbose``; the exit code it stands for."""
        if self.verbose and (details := reason(error)):
            import traceback

            say("".join(traceback.format_exception(details)), end="")
        text, code = in_words(error)
        is_ours = isinstance(error, EdgeVLMError | MemoryError | OSError)
        hint = "; run again with -v for the details and please report it"
        say_error(text if is_ours or self.verbose else text + hint)
        return code


def in_words(error: Exception) -> tuple[str, int]:
    """An error's one line, and its exit code."""
    if isinstance(error, EdgeVLMError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "not enough memory", 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1
    return f"unexpected {type(error).__name__}: {error}", 1


def reason(error: Exception) -> BaseException | None:
    """What is behind an error that was raised on purpose; any other says it all."""
    return error.__cause__ if isinstance(error, EdgeVLMError) else error


def session() -> Session:
    """That of the command that runs."""
    return click.get_current_context().ensure_object(Session)
