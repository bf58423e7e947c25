"""What a file is, from its bytes: named if it is not read, mended or refused if it is not whole.

Decoders fill what is missing with grey, black or noise and say nothing; here the file is looked at.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from edge_vlm.errors import ImageError, label

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_JPEG_SCANS = 100  # each is a pass over all pixels; encoders write about ten
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_PADDING = b"\x55" * 8  # a decoder looks up to 64 bits ahead
_LONG_ZEROS = 64  # bytes
_MAX_TRIED = 40_000_000  # pixels of a lossless WebP that is decoded to find out
_CUT = "is damaged or cut short"
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
N_BYTES = 4096  # that are looked at
_READ = {  # formats that are read, by how their files begin
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]",
    "AVIF": rb"....ftypavi[fs]",
}
_SAVE = "save it as JPEG or PNG"
_HEIC = "pip install 'edge-vlm[heic]' reads it, or " + _SAVE
_PDF = "pip install 'edge-vlm[pdf]' reads its pages, or save one as a picture"
_RAW = ("a camera's raw file", "develop it and " + _SAVE)
_VIDEO = "a video", "take a frame out of it, such as with ffmpeg -i FILE -frames:v 1 frame.png"
_TEXT = rb"(?:\xef\xbb\xbf)?\s*"
_KINDS: tuple[tuple[bytes, tuple[str, str]], ...] = (
    (rb"version https://git-lfs", ("a git-lfs pointer", "'git lfs pull' fetches the picture")),
    (rb"....ftyp(?:hei|hev|mif1|msf1)", ("HEIC", _HEIC)),
    (rb"....ftypavi[fs]", ("AVIF", "--allow-format avif reads it")),
    (rb"....ftypcrx ", _RAW),
    (rb"(?s:II\*\0....CR\x02)", _RAW),
    (rb"FUJIFILMCCD-RAW|IIRO|IIU\0|FOVb", _RAW),
    (rb"(?s:(?:II\*\0|MM\0\*).{0,4000}(?:NIKON|SONY|PENTAX|DNG|Canon EOS))", _RAW),
    (_READ["TIFF"], ("TIFF", "--allow-format tiff reads it")),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", ("JPEG XL", _SAVE)),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", ("JPEG 2000", _SAVE)),
    (rb"....ftyp|....moov|....mdat|....wide", _VIDEO),
    (rb"\x1aE\xdf\xa3|RIFF....AVI |FLV|\0\0\x01[\xb3\xba]|OggS", _VIDEO),
    (rb"%PDF", ("PDF", _PDF)),
    (rb"8BPS", ("a Photoshop file", _SAVE)),
    (rb"\0\0[\x01\x02]\0[^\0]\0", ("an icon", _SAVE)),
    (rb"%!PS|\xc5\xd0\xd3\xc6", ("PostScript", _SAVE)),
    (rb"P[1-7]\s", ("a PNM picture", _SAVE)),
    (rb"qoif|\x76\x2f\x31\x01|#\?RADIANCE|gimp xcf|AT&TFORM|SIMPLE  =|icns|DDS ", ("", _SAVE)),
    (rb"(?s:.{128}DICM)", ("DICOM", _SAVE)),
    (rb"PK\x03\x04|PK\x05\x06", ("a ZIP archive or an Office document", "give what is inside")),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", ("an archive", "unpack it")),
    (
        _TEXT
        + rb"(?:<\?xml(?s:.{0,2000}))?(?:<!--(?s:.{0,2000}?)-->\s*|<!DOCTYPE svg[^>]*>\s*)*<svg",
        ("SVG", "draw it as PNG, such as with rsvg-convert"),
    ),
    (
        _TEXT + rb"(?:<!--(?s:.{0,2000}?)-->\s*)*<(?:!doctype html|html|head|body|script)",
        ("an HTML page", "what was downloaded is a web page, not the picture"),
    ),
    (_TEXT + rb"[{\[]\s*[\"{\[\]}\d]", ("JSON", "perhaps a server's error; look at it as text")),
    (_TEXT + rb"<\?xml", ("XML", "perhaps a server's error; look at it as text")),
)


def format_of(start: bytes) -> str | None:
    """The format that a file begins like, one of those that can be read."""
    return next((name for name, how in _READ.items() if re.match(how, start, re.DOTALL)), None)


def kind_of(start: bytes) -> tuple[str, str] | None:
    """What a file that is not read begins like, and what to do; None if that is not known."""
    for how, (name, advice) in _KINDS:
        if re.match(how, start, re.DOTALL | re.IGNORECASE):
            return name or "a format of pictures", advice
    text = start.decode("utf-8", "ignore")
    if len(text.encode()) > len(start) - 4 and re.fullmatch(r"[^\0-\x08\x0e-\x1a\x7f]+", text):
        return "text", "perhaps a server's error; look at it"
    return None


def not_read(file: IO[bytes], formats: Sequence[str]) -> str:
    """Why a file is not read, for a message."""
    file.seek(0)
    start = file.read(N_BYTES)
    if format_of(start) in formats:
        return f"is damaged or cut short (it begins like {format_of(start)})"
    read = f"is not a picture in a format that is read ({', '.join(formats)})"
    if found := kind_of(start):
        return f"is {found[0]}, which is not read ({', '.join(formats)} are); {found[1]}"
    return read


def mended(file: IO[bytes], name: str) -> IO[bytes]:
    """A PNG, JPEG, WebP or BMP file as a decoder can be given it; ``name`` is for messages.

    Raises:
        ImageError: a part of the picture is missing, or one that decides pixels is damaged.
    """
    file.seek(0)
    start = file.read(12)
    try:
        if start[:2] == b"BM":
            _check_bmp(file)
        elif start[8:] == b"WEBP":
            _check_webp(file)
        else:
            file.seek(0)
            data = file.read()
            mend = _mended_png if start[:8] == PNG_SIGNATURE else _whole_jpeg
            return io.BytesIO(mend(data))
    except ValueError as error:
        raise ImageError(f"{label(name)}: {error}") from error
    return file


def _mended_png(data: bytes) -> bytes:
    """Without chunks that say nothing about pixels and have a wrong checksum, and with an end."""
    parts, position = [PNG_SIGNATURE], 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + length + 12]
        position += length + 12
        if kind == b"IDAT" or len(chunk) < length + 12:
            parts.append(chunk)  # the decoder finds out whether rows are missing
            continue
        if chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big"):
            parts.append(chunk)
        elif kind[0] < 0x60 or kind == b"tRNS":  # a capital letter: needed for the pixels
            name = kind.decode("latin-1")
            raise ValueError(f"{_CUT} (the checksum of its {_label_of(name)} is wrong)")
        if kind == b"IEND":
            break
    else:
        parts.append(struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND")))
    return b"".join(parts)


def _label_of(name: str) -> str:
    """A chunk's name for a message."""
    return f"{name} chunk" if name.isalpha() and name.isascii() else "first bytes"


@dataclass
class _Jpeg:
    """What the markers of a JPEG's first picture say."""

    frame: int | None = None  # the marker of its kind
    components: list[int] = field(default_factory=list)
    # Of each scan: components, first and last coefficient, bits left to come.
    scans: list[tuple[bytes, int, int, int]] = field(default_factory=list)
    tables: dict[int, bytes] = field(default_factory=dict)  # first symbol of each Huffman code
    data_start: int = 0  # behind the header of the first scan
    end: int | None = None  # where the end marker is


def _read_markers(data: bytes) -> _Jpeg:
    found, position = _Jpeg(), 2
    while match := _MARKER.search(data, position):
        marker, position = data[match.start() + 1], match.end()
        if marker == 0xD9:
            found.end = match.start()
            break
        if marker == 0x01:  # the only marker left that has no length
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        body = data[position + 2 : position + length]
        position += length
        if marker == 0xDA and body:
            n = body[0]
            ids, last = body[1 : 1 + 2 * n : 2], body[1 + 2 * n :]
            if len(last) >= 3:
                found.scans.append((ids, last[0], last[1], last[2] & 15))
            found.data_start = found.data_start or position
            if len(found.scans) > MAX_JPEG_SCANS:
                raise ValueError(f"has more than {MAX_JPEG_SCANS} scans; save it anew")
        elif marker == 0xC4:
            found.tables.update(_first_symbols(body))
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC) and len(body) >= 6:
            found.frame, found.components = marker, list(body[6::3])
    return found


def _first_symbols(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Of each Huffman table of a DHT segment: class and number, the symbol coded as zeros."""
    while len(body) > 17:
        n_symbols = sum(body[1:17])
        yield body[0], body[17:18]
        body = body[17 + n_symbols :]


def _whole_jpeg(data: bytes) -> bytes:
    """Up to the end of its first picture; of one scan without the end marker.

    With the marker, a decoder takes what is missing for grey; without, it says that the file ends.
    """
    jpeg = _read_markers(data)
    if jpeg.frame in _SEQUENTIAL and len(jpeg.scans) == 1:
        # A run of zero bits is nothing but blank blocks where both tables code those so.
        blank = all(symbol == b"\0" for symbol in jpeg.tables.values())
        zeros = data.find(bytes(_LONG_ZEROS), jpeg.data_start, jpeg.end)
        if zeros >= 0 and not blank:
            raise ValueError(f"{_CUT} (a part of it is zeros)")
        if jpeg.end is not None and len(jpeg.scans[0][0]) == len(jpeg.components):
            return data[: jpeg.end] + _PADDING
    elif jpeg.frame == _PROGRESSIVE and jpeg.end is not None:
        missing = _missing_scans(jpeg)
        if missing:
            raise ValueError(f"{_CUT} (some of its scans are missing)")
    if jpeg.end is None and data.endswith(bytes(16)):
        raise ValueError(f"{_CUT} (it ends in zeros)")
    return data


def _missing_scans(jpeg: _Jpeg) -> bool:
    """Whether some coefficients of a progressive picture were never sent to their last bit."""
    for component in jpeg.components:
        done: set[int] = set()
        for ids, first, last, bits_left in jpeg.scans:
            if component in ids and bits_left == 0:
                done.update(range(first, last + 1))
        if len(done) < 64:
            return True
    return False


def _check_webp(file: IO[bytes]) -> None:
    """A file that was not written to its end is zeros from there on."""
    n_bytes = file.seek(0, os.SEEK_END)
    position = 12
    while position + 18 <= n_bytes:
        file.seek(position)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind in (b"VP8 ", b"VP8L"):
            break
        position += 8 + length + length % 2
    else:
        return
    start, end = position + 8, min(position + 8 + length, n_bytes)
    n_zeros = end - _first_of_last_zeros(file, start, end)
    if n_zeros < 32:
        return
    file.seek(start)
    header = file.read(10)
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", header[6:]))
        # Of a plain area an encoder writes 0.2 bits that are zeros for each block of 16x16.
        is_cut = n_zeros * 8 > -(-width // 16) * -(-height // 16)
    else:
        sides = int.from_bytes(header[1:5], "little")
        width, height = (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
        # A plain area may be nothing but zeros, but all of them are needed.
        is_cut = width * height < _MAX_TRIED and _decodes_without(file, start, end, 24)
    if is_cut:
        raise ValueError(f"{_CUT} (it ends in zeros)")


def _decodes_without(file: IO[bytes], start: int, end: int, n_bytes: int) -> bool:
    """Whether a lossless WebP decodes without the last bytes of its pixels."""
    from PIL import Image

    file.seek(start)
    pixels = file.read(end - start - n_bytes)
    pixels += bytes(len(pixels) % 2)
    chunk = b"WEBPVP8L" + struct.pack("<I", len(pixels)) + pixels
    shorter = io.BytesIO(b"RIFF" + struct.pack("<I", len(chunk)) + chunk)
    try:
        with Image.open(shorter, formats=("WEBP",)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def _check_bmp(file: IO[bytes]) -> None:
    """Zeros may be black rows, but not from the middle of one row on to the end.

    In a file that was not written to its end, one row is a picture on the left and zeros on the
    right, the rows before it are a picture to their ends, and all behind it is zeros.
    """
    file.seek(0)
    header = file.read(54)
    if len(header) < 54:
        return
    offset, size, width, height, _, depth, compression = struct.unpack_from("<IIiihhI", header, 10)
    if size < 40 or compression not in (0, 3) or depth < 8 or width < 1:
        return
    row = (width * depth + 31) // 32 * 4
    n_bytes = min(file.seek(0, os.SEEK_END), offset + row * abs(height))
    first = _first_of_last_zeros(file, offset, n_bytes)
    cut_row, column = divmod(first - offset, row)
    if cut_row == 0 or n_bytes - first < 8 * row:
        return
    file.seek(offset + (cut_row - 1) * row)
    before, cut = file.read(row), file.read(row)
    used = width * depth // 8
    if 8 < column < used - 8 and any(cut[:4]) and any(before[used - 4 : used]):
        raise ValueError(f"{_CUT} (from one point on it is zeros)")


def _first_of_last_zeros(file: IO[bytes], start: int, end: int) -> int:
    """Where the zeros begin that reach to ``end``."""
    step = 1 << 20
    while end > start:
        begin = max(start, end - step)
        file.seek(begin)
        kept = file.read(end - begin).rstrip(b"\0")
        if kept:
            return begin + len(kept)
        end = begin
    return start
