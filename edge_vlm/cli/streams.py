"""The streams of a command: they are there, hold any text, and do not drive a terminal.

Whatever commands write passes here (and progress bars through ``display``). An answer is written
as it is, except to a terminal; all other text is escaped wherever it goes, as names of files, texts
of a bundle and engines' errors are other people's and may end on a terminal later.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from typing import Any

import click

from edge_vlm.errors import harmless

_NOT_IN_JSON = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def prepare() -> None:
    """Open streams that are closed and let each hold any text, before anything else is opened.

    Otherwise the next file would get the number of a stream, and what a library prints with it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free: this number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - to the end
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")


def write_answer(text: str) -> None:
    """Write a piece of an answer to stdout; on a terminal control characters are escaped."""
    sys.stdout.write(harmless(text, bidi=False) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write(text: str) -> None:
    """Write lines that are no answer to stdout."""
    sys.stdout.write(f"{harmless(text)}\n")
    sys.stdout.flush()


def write_path(path: str | os.PathLike[str]) -> None:
    """Write a path to stdout; a program gets the bytes of its name."""
    if os.name == "nt" or sys.stdout.isatty():
        write(os.fspath(path))
    else:
        write_bytes(os.fsencode(path) + b"\n")


def write_bytes(data: bytes) -> None:
    """Write a file to stdout, which is no terminal."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def write_json(value: Any) -> None:
    """Write a value to stdout as one line of JSON, whatever text is in it and the encoding is."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    text = json.dumps(value, ensure_ascii=not is_utf8)
    sys.stdout.write(_NOT_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")
    sys.stdout.flush()


def say(text: str, end: str = "\n") -> None:
    """Write to stderr what is not a result."""
    sys.stderr.write(harmless(text) + end)
    sys.stderr.flush()


def say_error(text: str) -> None:
    """Write an error to stderr, as one line."""
    click.echo(click.style("Error:", fg="red"), err=True, nl=False)
    say(f" {' '.join(text.split())}")
