"""What a user names as a picture, besides files: data: URLs, objects, pipes, and parts of files.

``report.pdf#page=3`` is a page, ``#page=1-3`` several, ``film.gif#frame=2`` a frame; the
first is 1. A file whose own name is that comes before.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import queue
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_vlm.errors import ImageError, PromptError, label
from edge_vlm.pictures.damage import N_BYTES, format_of, kind_of, not_read

MAX_FILE_BYTES = 256 << 20
MAX_PARTS = 64  # that one name may stand for
PIPE_SECONDS = 60.0  # without a byte
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+(?:;[a-z0-9-]+=[^;,]*)*;base64,", re.IGNORECASE)
_PART = re.compile(r"(.+)#(page|frame)=(\d{1,6})(?:-(\d{1,6}))?", re.DOTALL)
_CROP = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(%?)\s*")
_SHAPE = "crop: must be X,Y,W,H in pixels or per cent, such as 100,50,640,480 or 10%,20%,50%,30%"

Side = tuple[float, bool]  # a number, and whether it is per cent


def content(source: Any, formats: Sequence[str]) -> Any:
    """The bytes of a file, an array or a PIL image, from what is no path.

    Args:
        source: as of ``image.open_image``.
        formats: that are read; a long data: URL that begins otherwise is not decoded.

    Raises:
        ImageError: it is none of these, or cannot be read.
    """
    if isinstance(source, np.ndarray | bytes | bytearray | memoryview):
        return source
    if isinstance(source, str):
        return _data_url(source, formats)
    if hasattr(source, "read"):
        return read_object(source)
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    if hasattr(source, "__array__"):
        try:
            return np.asarray(source)
        except Exception as error:  # whatever somebody else's code raises
            raise ImageError(f"the image: its __array__ failed ({error})") from error
    raise ImageError(
        "an image is a path, bytes, an object with read() or __array__, a PIL image or an array,"
        f" not {type(source).__name__}"
    )


def _data_url(url: str, formats: Sequence[str]) -> bytes:
    match = _DATA_URL.match(url)
    if not match:
        raise ImageError("the data: URL is not of the form data:image/...;base64,...")
    if len(url) > MAX_FILE_BYTES * 4 // 3 + 1000:
        raise ImageError(f"the data: URL holds more than {MAX_FILE_BYTES >> 20} MiB")
    try:
        start = base64.b64decode(url[match.end() : match.end() + N_BYTES], validate=True)
        kind = format_of(start) or (kind_of(start) or ("",))[0]
        if len(url) > 1 << 20 and kind not in (*formats, "PDF", "HEIC"):
            raise ImageError(f"the data: URL: {not_read(io.BytesIO(start), formats)}")
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data: URL is not valid base64 ({error})") from error


def each_part(source: Any) -> list[Any]:
    """One name for every page or frame that a name stands for; anything else as it is.

    Raises:
        ImageError: the range is empty or too long.
    """
    match = _PART.fullmatch(os.fspath(source)) if isinstance(source, str | Path) else None
    if match is None or match[4] is None or os.path.exists(source):
        return [source]
    first, last = int(match[3]), int(match[4])
    if not 1 <= first <= last < first + MAX_PARTS:
        raise ImageError(
            f"{label(source)}: {match[2]}s are counted from 1, the first before the last, and at"
            f" most {MAX_PARTS} at once"
        )
    return [f"{match[1]}#{match[2]}={number}" for number in range(first, last + 1)]


def file_and_part(name: str) -> tuple[str, tuple[str, int]]:
    """The file's own name and, say, ("page", 3).

    Raises:
        ImageError: it names no part.
    """
    match = _PART.fullmatch(name)
    if match is None or match[4] is not None or int(match[3]) < 1:
        raise ImageError(
            f"{label(name)}: No such file; a part of one is '#page=3' of a PDF, '#frame=2' of an"
            " animation"
        )
    return match[1], (match[2], int(match[3]))


def read_object(source: Any) -> bytes:
    """All that a binary file or another object with ``read`` holds, from its beginning.

    Raises:
        ImageError: it is text, too large, or cannot be read.
    """
    try:
        if getattr(source, "seekable", bool)():
            source.seek(0)
        data = source.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"the image: cannot be read ({error})") from error
    if isinstance(data, str):
        raise ImageError("the image: its read() gives text; open the file with mode 'rb'")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ImageError(f"the image: its read() gives {type(data).__name__}, not bytes")
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"the image: is larger than {MAX_FILE_BYTES >> 20} MiB")
    return bytes(data)


def is_pipe(name: str) -> bool:
    """Whether a path is one that can be read only once: a named pipe, or the shell's <(...)."""
    try:
        path = Path(name)
        return path.is_fifo() or path.is_socket() or (path.exists() and _is_stdin(path))
    except (OSError, ValueError):
        return False


def _is_stdin(path: Path) -> bool:
    return str(path) in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


def read_pipe(
    name: str, *, max_bytes: int = MAX_FILE_BYTES, seconds: float = PIPE_SECONDS
) -> bytes:
    """All that comes through a pipe; ``-`` is stdin.

    Raises:
        ImageError: it cannot be opened, holds too much, or nothing came for ``seconds``.
    """
    where = "stdin" if name == "-" else label(name)
    came: queue.SimpleQueue[bytes | OSError] = queue.SimpleQueue()

    def run() -> None:
        left = max_bytes + 1
        try:
            # Not through sys.stdin: its lock would be held when the interpreter ends.
            with open(0 if name == "-" else name, "rb", 0, closefd=name != "-") as pipe:
                while left > 0 and (data := pipe.read(min(left, 1 << 20))):
                    came.put(data)
                    left -= len(data)
            came.put(b"")
        except OSError as error:
            came.put(error)

    if name == "-" and not _has_descriptor():
        return bytes(sys.stdin.buffer.read(max_bytes + 1))
    threading.Thread(target=run, name="edge-vlm pipe", daemon=True).start()
    parts: list[bytes] = []
    while True:
        part = _next(came, where, seconds)
        if not part:
            break
        parts.append(part)
    if sum(map(len, parts)) > max_bytes:
        raise ImageError(f"{where}: holds more than {max_bytes >> 20} MiB")
    return b"".join(parts)


def _next(came: queue.SimpleQueue[bytes | OSError], where: str, seconds: float) -> bytes:
    try:
        part = came.get(timeout=seconds)
    except queue.Empty:
        raise ImageError(f"{where}: nothing came for {seconds:g} s") from None
    if isinstance(part, OSError):
        raise ImageError(f"{where}: {part.strerror or part}") from part
    return part


def _has_descriptor() -> bool:
    """Whether stdin is the process's own, not an object that stands for it."""
    try:
        return sys.stdin.fileno() == 0
    except (AttributeError, OSError, ValueError):
        return False


def parse_crop(crop: Any) -> tuple[Side, Side, Side, Side]:
    """Left, top, width and height, from text such as ``10%,20%,50%,30%`` or four whole numbers.

    Raises:
        PromptError: it is something else.
    """
    parts = crop.split(",") if isinstance(crop, str) else crop
    if not isinstance(parts, list | tuple) or len(parts) != 4:
        raise PromptError(f"{_SHAPE}, not {str(crop)[:100]!r}")
    found: list[Side] = []
    for part in parts:
        match = _CROP.fullmatch(str(part))
        if not match or (not match[2] and "." in match[1]):
            raise PromptError(f"{_SHAPE}, not {str(crop)[:100]!r}")
        found.append((float(match[1]), bool(match[2])))
    left, top, width, height = found
    if not width[0] or not height[0]:
        raise PromptError("crop: a part has at least one pixel on each side")
    return left, top, width, height


def crop_box(crop: Any, n_columns: int, n_rows: int) -> tuple[int, int, int, int]:
    """Left, top, width and height in pixels of a picture of that size.

    Raises:
        PromptError: see ``parse_crop``.
        ImageError: it reaches beyond the picture.
    """
    sides = zip(parse_crop(crop), (n_columns, n_rows) * 2, strict=True)
    left, top, width, height = (
        round(number * side / 100) if per_cent else int(number)
        for (number, per_cent), side in sides
    )
    width, height = max(width, 1), max(height, 1)
    if left + width > n_columns or top + height > n_rows:
        raise ImageError(
            f"crop: {left},{top},{width},{height} reaches beyond the picture, which is"
            f" {n_columns}x{n_rows}"
        )
    return left, top, width, height
