"""From a file, bytes or an image object to RGB pixels.

Pictures are untrusted. Only the decoders named here are ever used, sizes are checked from the
header before a pixel is decoded, and a file that ends early is an error, never a half-grey picture.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import importlib
import io
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import ImageError, label
from edge_vlm.machine.settings import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
EXTRA_FORMATS = ("TIFF", "AVIF")  # on request only
MAX_FILE_BYTES = 256 << 20
MAX_PNG_CHUNKS = 100_000
MAX_PNG_TEXT_BYTES = 16 << 20  # of one chunk that holds no pixels
MAX_JPEG_SCANS = 100  # each is a pass over all pixels; encoders write about ten

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+(?:;[a-z0-9-]+=[^;,]*)*;base64,", re.IGNORECASE)
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_ORIENTATION = 0x0112
_pillow_globals = threading.Lock()

UInt8 = npt.NDArray[np.uint8]


def load_image(
    source: Any, *, max_pixels: int = MAX_PIXELS, extra_formats: Sequence[str] = ()
) -> UInt8:
    """Read a picture.

    Args:
        source: path, ``data:`` URL, bytes of a file, PIL image, or array of shape (h, w),
            (h, w, 1), (h, w, 3) or (h, w, 4), uint8 or uint16.
        max_pixels: largest width x height that is decoded.
        extra_formats: of ``EXTRA_FORMATS``, those to accept besides ``FORMATS``.

    Returns:
        (height, width, 3) uint8, EXIF orientation applied, alpha dropped. Of an animation the
        first frame.

    Raises:
        ImageError: it cannot be read; the message names the picture and the reason.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), "the image", max_pixels, extra_formats)
    if isinstance(source, str) and source[:5].lower() == "data:":
        data = io.BytesIO(_data_url(source))
        return _decode(data, "the data: URL", max_pixels, extra_formats)
    if isinstance(source, str | os.PathLike):
        name = os.fsdecode(os.fspath(source))
        if re.match(r"[a-z][a-z0-9+.-]+://", name, re.IGNORECASE):
            raise ImageError(f"{label(name)}: URLs are not fetched; download the picture first")
        with _open_file(Path(name)) as file:
            return _decode(file, name, max_pixels, extra_formats)
    from PIL import Image

    if isinstance(source, Image.Image):
        with _pillow_errors("the image"):
            return _to_rgb(source, "the image", max_pixels)
    raise ImageError(
        f"an image is a path, bytes, a PIL image or an array, not {type(source).__name__}"
    )


def _open_file(path: Path) -> IO[bytes]:
    try:
        # Looked at before it is opened: opening a FIFO would wait for a writer.
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise ImageError(f"{label(path)}: is a folder, not a picture")
        if not stat.S_ISREG(info.st_mode):
            raise ImageError(f"{label(path)}: is not a regular file")
        return path.open("rb")
    except OSError as error:
        raise ImageError(f"{label(path)}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise ImageError(f"{label(path)}: {error}") from error


def _data_url(url: str) -> bytes:
    match = _DATA_URL.match(url)
    if not match:
        raise ImageError("the data: URL is not of the form data:image/...;base64,...")
    if len(url) > MAX_FILE_BYTES * 4 // 3 + 1000:
        raise ImageError(f"the data: URL holds more than {MAX_FILE_BYTES >> 20} MiB")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data: URL is not valid base64 ({error})") from error


def _decode(file: IO[bytes], name: str, max_pixels: int, extra_formats: Sequence[str]) -> UInt8:
    n_bytes = file.seek(0, os.SEEK_END)
    if n_bytes == 0:
        raise ImageError(f"{label(name)}: is empty")
    if n_bytes > MAX_FILE_BYTES:
        raise ImageError(f"{label(name)}: is larger than {MAX_FILE_BYTES >> 20} MiB")
    formats = _allowed(extra_formats)
    from PIL import Image, UnidentifiedImageError

    with _pillow_errors(name):
        _check_structure(file, name, n_bytes)
        file.seek(0)
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError as error:
            raise ImageError(
                f"{label(name)}: is not a picture in a format that is read ({', '.join(formats)})"
            ) from error
        with image:
            return _to_rgb(image, name, max_pixels)


def _check_structure(file: IO[bytes], name: str, n_bytes: int) -> None:
    """Refuse what makes a decoder work for long on few pixels."""
    file.seek(0)
    start = file.read(8)
    if start == b"\x89PNG\r\n\x1a\n":
        _check_png(file, name, n_bytes)
    elif start[:2] == b"\xff\xd8":
        file.seek(0)
        if _jpeg_scans(file.read()) > MAX_JPEG_SCANS:
            raise ImageError(f"{label(name)}: has more than {MAX_JPEG_SCANS} scans; save it anew")


def _check_png(file: IO[bytes], name: str, n_bytes: int) -> None:
    for _ in range(MAX_PNG_CHUNKS):
        header = file.read(8)
        if len(header) < 8 or header[4:] == b"IEND":
            return
        (length,) = struct.unpack(">I", header[:4])
        if length > MAX_PNG_TEXT_BYTES and header[4:] != b"IDAT":
            size = f"{length >> 20} MiB that are not pixels"
            raise ImageError(f"{label(name)}: holds {size}; save it anew")
        if file.seek(length + 4, os.SEEK_CUR) > n_bytes:
            return  # cut short: the decoder finds out
    raise ImageError(f"{label(name)}: has more than {MAX_PNG_CHUNKS} chunks; save it anew")


def _jpeg_scans(data: bytes) -> int:
    """Start-of-scan markers up to the end of the first picture in a JPEG file."""
    n_scans, position = 0, 2
    while match := _JPEG_MARKER.search(data, position):
        marker, position = data[match.start() + 1], match.end()
        if marker == 0xD9 or n_scans > MAX_JPEG_SCANS:
            break
        n_scans += marker == 0xDA
        if marker != 0x01:  # the only marker left that has no length
            position += int.from_bytes(data[position : position + 2], "big")
    return n_scans


def _allowed(extra_formats: Sequence[str]) -> tuple[str, ...]:
    """The formats to accept, their decoders imported: Pillow would import all others too."""
    extra = [name.upper() for name in extra_formats]
    for name in extra:
        if name not in EXTRA_FORMATS:
            raise ImageError(f"format {name}: only {' and '.join(EXTRA_FORMATS)} can be added")
    for name in (*FORMATS, *extra):
        importlib.import_module(f"PIL.{'WebP' if name == 'WEBP' else name.title()}ImagePlugin")
    from PIL import Image

    for name in extra:
        if name not in Image.OPEN:
            raise ImageError(f"format {name}: this build of Pillow cannot read it")
    return tuple(name for name in (*FORMATS, *extra) if name in Image.OPEN)


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> UInt8:
    from PIL import ImageOps

    width, height = image.size
    _check_size(width, height, name, max_pixels)
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF says nothing about the pixels
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError(f"{label(name)}: has {image.mode}-mode pixels; save it as 8 or 16 bit")
    if image.mode.startswith("I"):
        return _from_array(np.asarray(image).astype(np.uint16), max_pixels)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    # In strips: Pillow's own conversion would hold two more copies of the whole picture.
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    step = max(1, (1 << 22) // image.width)
    for top in range(0, image.height, step):
        box = (0, top, image.width, min(image.height, top + step))
        pixels[top : top + step] = np.asarray(image.crop(box))
    return pixels


def _from_array(array: npt.NDArray[Any], max_pixels: int) -> UInt8:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ImageError(
            f"an image array has shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), not {array.shape}"
        )
    _check_size(array.shape[1], array.shape[0], "the image", max_pixels)
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)  # the high byte, as PNG readers do
    elif array.dtype != np.uint8:
        raise ImageError(f"an image array is uint8 or uint16, not {array.dtype}")
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array[..., :3])


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{label(name)}: has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{label(name)}: has {width}x{height} = {width * height / 1e6:.0f} megapixels, more"
            f" than the limit of {max_pixels / 1e6:g}; make it smaller or raise the limit"
        )


@contextlib.contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Convert whatever Pillow raises, and keep its global switches from changing the result."""
    from PIL import Image, ImageFile

    with _pillow_globals, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own size warning starts below our limit
        truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        bomb, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is checked instead
        try:
            yield
        except ImageError:
            raise
        except MemoryError as error:
            raise ImageError(f"{label(name)}: not enough memory to decode it") from error
        except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ImageError(f"{label(name)}: is damaged or cut short ({reason})") from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated
            Image.MAX_IMAGE_PIXELS = bomb
