"""What words mean: which are pictures and which the question, and how people write a path."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from urllib.request import url2pathname

import click

from edge_vlm.errors import ImageError, label
from edge_vlm.machine.folders import user_path

HINT = "pictures come first, the question last, in quotes; -- goes before one that begins with -"
_SUFFIX = "png|jpg|jpeg|jfif|jpe|webp|bmp|gif|tif|tiff|avif|heic|heif|jxl|svg|pdf"
_PICTURE = re.compile(rf"[^\n]+\.({_SUFFIX})(#\S*)?", re.IGNORECASE)
_ELSEWHERE = re.compile(r"data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # what reads pictures judges
_MAX_NAMES = 10_000  # of a folder, to look for one that is near


class AboutPictures(click.Command):
    """A command whose words are pictures and a question."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Say how a question is given that begins like an option."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            if name.startswith("--") and " " not in name:
                raise
            message = f"{error.message} If it is a question: {HINT}."
            raise click.NoSuchOption(name, message, error.possibilities, ctx) from None


def split_words(words: Sequence[str]) -> tuple[list[str], str]:
    """Pictures, each a path, ``-`` or what only looks like one; and the question.

    Raises:
        click.UsageError: there is no question, or the order is another.
        ImageError: there is no such picture.
    """
    if not words:
        raise click.UsageError("no question; see 'edge-vlm ask --help'")
    *images, question = words
    images = [as_path(image) for image in images]
    if not question.strip():
        raise click.UsageError("the question is empty")
    if images.count("-") > 1:
        raise click.UsageError("stdin ('-') can be only one of the pictures")
    for image in images:
        if image == "-" or _ELSEWHERE.match(image) or _exists(image):
            continue
        if _PICTURE.fullmatch(image) and not os.path.isfile(question):
            raise ImageError(f"{label(image)}: No such file or directory{_near(image)}")
        raise ImageError(f"{label(image)}: No such file or directory; {HINT}")
    path = as_path(question)
    if path == "-" or (os.path.isfile if images else _exists)(path):
        raise click.UsageError(f"no question about {label(question)}; it comes after the picture")
    if _PICTURE.fullmatch(path) and not _ELSEWHERE.match(path):
        near = _near(path)
        if near or not re.search(r"\s", path):
            raise click.UsageError(
                f"{label(question)}: no such file{near}; a question comes after the picture"
            )
    return images, question


def as_path(text: str) -> str:
    """The path in a ``file://`` URL; other text as it is."""
    if text[:7].lower() != "file://":
        return text
    return url2pathname(re.sub(r"(?i)^file://(localhost(?=/))?", "", text))


def typed_paths(text: str) -> list[str]:
    """Paths as people type them, or drop files on a terminal: as they are, or with quotes,
    backslashes, ``~`` or ``file://``.

    Several are told apart only if there is such a file for each.

    Raises:
        InputError: there is no such home.
    """
    if _exists(text):
        return [text]
    words = [text]
    with suppress(ValueError):  # a quote without an end
        words = shlex.split(text, posix=os.name == "posix")
    paths = [as_path(word.strip("'\"")) for word in words]
    paths = [str(user_path(path)) if path.startswith("~") else path for path in paths]
    if len(paths) == 1 or all(map(_exists, paths)):
        return paths
    return [str(user_path(text)) if text.startswith("~") else as_path(text)]


def names_pictures(line: str) -> bool:
    """Whether a line that could be a question is the path of pictures, or meant as one."""
    paths = typed_paths(line) if not line.startswith("~") or "/" in line else [line]
    if all(map(os.path.isfile, paths)):
        return any(_PICTURE.fullmatch(path) or os.sep in path for path in paths)
    (path,) = paths[:1]
    is_url = line[:7].lower() == "file://"
    return is_url or bool(_PICTURE.fullmatch(path) and (os.path.isabs(path) or " " not in path))


def _exists(path: str) -> bool:
    """Also with a page or frame behind its name."""
    return os.path.exists(path) or ("#" in path and os.path.exists(path.rpartition("#")[0]))


def _near(path: str) -> str:
    """Pictures of the folder whose names are like this one."""
    folder, name = os.path.split(path)
    names: list[str] = []
    with suppress(OSError, ValueError), os.scandir(folder or ".") as entries:
        names = [entry.name for entry in islice(entries, _MAX_NAMES)]
    found = difflib.get_close_matches(name, filter(_PICTURE.fullmatch, names), 3, 0.7)
    return (
        f" (near it: {', '.join(label(os.path.join(folder, name)) for name in found)})"
        if found
        else ""
    )
