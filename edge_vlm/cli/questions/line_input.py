"""Lines from a person or a program: editing and history on a terminal, plain lines from a pipe."""

from __future__ import annotations

import codecs
import contextlib
import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from edge_vlm.cli.streams import say, write
from edge_vlm.errors import InputError, harmless
from edge_vlm.machine.folders import new_file

MAX_LINE = 4_000_000  # characters; a conversation takes no more
_HISTORY_LINES = 1000


class LineInput:
    """Reads lines from stdin.

    Args:
        commands: words that the Tab key completes, the names of files after them too.
        history: file that keeps the lines, readable by the user alone; None for none.
    """

    def __init__(self, commands: Sequence[str], history: Path | None) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._is_first = True
        self._commands = commands
        self._history = history
        self._readline = _readline() if self.is_terminal and sys.stdout.isatty() else None

    def __enter__(self) -> LineInput:
        if self._readline:
            self._readline.set_completer_delims(" \t")
            self._readline.set_completer(self._complete)
            libedit = "libedit" in (self._readline.__doc__ or "")
            self._readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
            if self._history:
                with contextlib.suppress(OSError):
                    self._readline.read_history_file(self._history)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._readline:
            self._readline.set_completer(None)
            if self._history:
                with contextlib.suppress(OSError):  # history is a convenience
                    self._write_history(self._readline, self._history)

    def read(self) -> str | None:
        """The next line without its end; None at the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C at the prompt.
            InputError: it is text of another encoding.
        """
        if self._readline:
            try:
                return input("> ")
            except EOFError:
                write("")
                return None
        if self.is_terminal:
            say("> ", end="")
        line = sys.stdin.buffer.readline(MAX_LINE)
        if self._is_first and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError("stdin: is UTF-16 text; only UTF-8 is read")
        line = line.removeprefix(codecs.BOM_UTF8) if self._is_first else line
        self._is_first = False
        # As names of files are decoded, so that any comes back as it was.
        return line.decode("utf-8", "surrogateescape").rstrip("\r\n") if line else None

    def confirm(self, question: str) -> bool:
        """Ask yes or no on the terminal; no if nobody is there to ask."""
        if not self.is_terminal:
            return False
        say(f"{question} [y/N] ", end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def _complete(self, text: str, state: int) -> str | None:
        if self._readline and self._readline.get_begidx() == 0:
            found = [command for command in self._commands if command.startswith(text)]
        else:
            pattern = glob.escape(os.path.expanduser(text)) + "*"
            found = [p + os.sep if os.path.isdir(p) else p for p in sorted(glob.glob(pattern))]
        found = [text for text in found if text == harmless(text)]
        return found[state] if state < len(found) else None

    def _write_history(self, readline: ModuleType, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.set_history_length(_HISTORY_LINES)
        with new_file(path) as part:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            readline.write_history_file(part)
            os.chmod(part, 0o600)
            os.replace(part, path)


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # Windows, whose console edits lines itself
        return None
    return readline
