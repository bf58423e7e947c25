"""From a file, bytes or an image object to RGB pixels.

Pictures are untrusted. Only the decoders named here are ever used, sizes are checked from the
header before a pixel is decoded, and a file that ends early is an error, never a half-grey picture.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import ImageError, label
from edge_vlm.machine.settings import MAX_PIXELS, MachineSettings

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
EXTRA_FORMATS = ("TIFF", "AVIF")  # on request only
MAX_FILE_BYTES = 256 << 20
MAX_PNG_CHUNKS = 100_000
MAX_PNG_TEXT_BYTES = 16 << 20  # of one chunk that holds no pixels
# Of memory while decoding, for each pixel that is allowed: 600 MB for 100 megapixels.
BYTES_PER_PIXEL = 6
# What libraries take besides the pixels themselves, in bytes a pixel (measured).
_DECODER_BYTES = {"WEBP": 12, "AVIF": 8}
_STORED_AS_FOUR = {"RGB": "RGBX", "RGBA": "RGBA", "LA": "RGBA", "CMYK": "CMYK"}
_STRIP_BYTES = 4 << 20
_ORIENTATION, _ROWS_PER_STRIP = 0x0112, 0x0116
_pillow_globals = threading.Lock()

UInt8 = npt.NDArray[np.uint8]
Accepts = Callable[[int, int], object]  # width, height; raises ImageError
Part = tuple[str, int] | None  # ("page", 3) or ("frame", 2) of a file


@dataclass(frozen=True)
class Opened:
    """A picture's pixels, and what was done to get them."""

    pixels: UInt8  # (height, width, 3); maybe a view into a larger array
    alpha: str | None = (
        None  # how hidden pixels were taken, "white" or "drop"; None: there are none
    )
    crop: tuple[int, int, int, int] | None = None  # left, top, width, height in pixels


@dataclass(frozen=True)
class Cropped:
    """A part of a picture; ``crop`` as of ``edge_vlm.pictures.sources.parse_crop``."""

    source: Any
    crop: Any


def load_image(
    source: Any,
    *,
    max_pixels: int = MAX_PIXELS,
    extra_formats: Sequence[str] = (),
    alpha: str = "white",
) -> UInt8:
    """The pixels of ``open_image`` with these settings."""
    settings = MachineSettings(
        cache=None, max_pixels=max_pixels, image_formats=tuple(extra_formats), alpha=alpha
    )
    return open_image(source, settings).pixels


def open_image(source: Any, settings: MachineSettings, accepts: Accepts | None = None) -> Opened:
    """Read a picture.

    Args:
        source: path, ``data:`` URL, bytes of a file, object with ``read`` or ``__array__``, PIL
            image, or array of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), uint8, uint16 or
            bool; or one that is opened, or ``Cropped``.
        settings: ``max_pixels`` is the largest width x height that is decoded, ``image_formats``
            those of ``EXTRA_FORMATS`` to accept. ``alpha`` says what hidden pixels become: "white"
            composites on white, with round((c * a + 255 * (255 - a)) / 255) for every 8-bit level
            c under opacity a, 16-bit levels reduced to their high byte before; "drop" takes
            the colours as they are stored.
        accepts: told the size before pixels are decoded.

    Returns:
        EXIF orientation applied. Of an animation the first frame.

    Raises:
        ImageError: it cannot be read; the message names the picture and the reason.
    """
    if isinstance(source, Opened):
        return source
    if isinstance(source, str | os.PathLike):
        name = os.fsdecode(os.fspath(source))
        if name[:5].lower() != "data:":
            return _open_path(name, settings, accepts)
    from edge_vlm.pictures.sources import content, crop_box

    if isinstance(source, Cropped):
        opened = open_image(source.source, settings)
        n_rows, n_columns = opened.pixels.shape[:2]
        left, top, width, height = box = crop_box(source.crop, n_columns, n_rows)
        part = opened.pixels[top : top + height, left : left + width]
        return Opened(part, opened.alpha, box)
    name = "the data: URL" if isinstance(source, str) else "the image"
    found = content(source, (*FORMATS, *settings.image_formats))
    if isinstance(found, bytes | bytearray | memoryview):
        return decode(io.BytesIO(found), name, settings, accepts)
    if isinstance(found, np.ndarray):
        return _from_array(found, settings, accepts)
    with pillow_errors(name):
        return from_pillow(found, name, settings, accepts)


def _from_array(
    array: npt.NDArray[Any], settings: MachineSettings, accepts: Accepts | None
) -> Opened:
    from edge_vlm.pictures.alpha import array_pixels, array_size

    width, height = array_size(array)
    check_size(width, height, "the image", settings.max_pixels)
    if accepts:
        accepts(width, height)
    pixels, is_hidden = array_pixels(array, settings.alpha)
    return Opened(pixels, settings.alpha if is_hidden else None)


def _open_path(name: str, settings: MachineSettings, accepts: Accepts | None) -> Opened:
    if re.match(r"[a-z][a-z0-9+.-]+://", name, re.IGNORECASE):
        raise ImageError(f"{label(name)}: URLs are not fetched; download the picture first")
    if "#" in name and not os.path.exists(name):
        from edge_vlm.pictures.sources import file_and_part

        path, part = file_and_part(name)
        with open_file(Path(path)) as file:
            return decode(file, name, settings, accepts, part)
    with open_file(Path(name)) as file:
        return decode(file, name, settings, accepts)


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file; ImageError for what is none, or cannot be opened."""
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


def decode(
    file: IO[bytes],
    name: str,
    settings: MachineSettings,
    accepts: Accepts | None,
    part: Part = None,
) -> Opened:
    """Read a picture from an open file; ``name`` is for messages, the rest as ``open_image``.

    ``part`` is a page or a frame, and its number.
    """
    n_bytes = file.seek(0, os.SEEK_END)
    if n_bytes == 0:
        raise ImageError(f"{label(name)}: is empty")
    if n_bytes > MAX_FILE_BYTES:
        raise ImageError(f"{label(name)}: is larger than {MAX_FILE_BYTES >> 20} MiB")
    formats = _allowed(settings.image_formats)
    from PIL import Image, UnidentifiedImageError

    with pillow_errors(name):
        file = _checked(file, name, n_bytes)
        file.seek(0)
        try:
            image: Image.Image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            return _open_document(file, name, settings, accepts, part)
        with image:
            if part:
                check_size(*image.size, name, settings.max_pixels)
                from edge_vlm.pictures.documents import show_frame

                show_frame(image, part, name, settings.max_pixels)
            return from_pillow(image, name, settings, accepts, own=part is None)


def _open_document(
    file: IO[bytes], name: str, settings: MachineSettings, accepts: Accepts | None, part: Part
) -> Opened:
    """What Pillow does not read, where another package does."""
    from edge_vlm.pictures.documents import render

    def check(width: int, height: int, kind: str, n_bytes: int) -> None:
        check_size(width, height, name, settings.max_pixels)
        check_memory(width, height, n_bytes, kind, name, settings.max_pixels)
        if accepts:
            accepts(width, height)

    found = render(file, name, _allowed(settings.image_formats), part, settings.dpi, check)
    if isinstance(found, np.ndarray):
        return Opened(found)
    return from_pillow(found, name, settings)


def _checked(file: IO[bytes], name: str, n_bytes: int) -> IO[bytes]:
    """The file, or what of it can be read without harm.

    Refuses what makes a decoder work for long on few pixels, or give half a picture.
    """
    file.seek(0)
    start = file.read(12)
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        file.seek(8)
        if _png_is_sound(file, name, n_bytes):
            return file
    elif start[:2] not in (b"\xff\xd8", b"BM") and start[8:] != b"WEBP":
        return file
    from edge_vlm.pictures.damage import mended

    return mended(file, name)


def _png_is_sound(file: IO[bytes], name: str, n_bytes: int) -> bool:
    """Whether the file has an end, and all checksums of what is not pixels are right."""
    for _ in range(MAX_PNG_CHUNKS):
        header = file.read(8)
        if len(header) < 8:
            return False
        if header[4:] == b"IEND":
            return True
        (length,) = struct.unpack(">I", header[:4])
        if header[4:] == b"IDAT":
            if file.seek(length + 4, os.SEEK_CUR) > n_bytes:
                return True  # cut short: the decoder finds out
            continue
        if length > MAX_PNG_TEXT_BYTES:
            size = f"{length >> 20} MiB that are not pixels"
            raise ImageError(f"{label(name)}: holds {size}; save it anew")
        data, checksum = file.read(length), file.read(4)
        if checksum != zlib.crc32(header[4:] + data).to_bytes(4, "big"):
            return False
    raise ImageError(f"{label(name)}: has more than {MAX_PNG_CHUNKS} chunks; save it anew")


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


def from_pillow(
    image: Image.Image,
    name: str,
    settings: MachineSettings,
    accepts: Accepts | None = None,
    *,
    own: bool = False,
) -> Opened:
    """As ``open_image``; ``own`` ones are decoded here, and nobody else has them."""
    width, height = image.size
    check_size(width, height, name, settings.max_pixels)
    if accepts:
        accepts(width, height)
    if image.format == "BMP" and own:
        from edge_vlm.pictures.alpha import with_fourth_byte

        with_fourth_byte(image)
    hidden = None
    if "transparency" in image.info:
        from edge_vlm.pictures.alpha import hidden_colour

        hidden = hidden_colour(image)
    memory = _memory(image, name, settings.max_pixels) if own else None
    if image.format == "TIFF":
        from edge_vlm.machine.process import without_stderr

        with without_stderr():  # libtiff writes there
            image.load()
    image.load()
    turned = 1
    with contextlib.suppress(Exception):  # broken EXIF says nothing about the pixels
        turned = image.getexif().get(_ORIENTATION, 1)
    width, height = image.size  # a TIFF turns itself
    if memory is None:
        pixels = np.empty((height, width, 3), np.uint8)
    else:  # every strip is read before the memory it was in is written
        pixels = memory.ravel()[: height * width * 3].reshape(height, width, 3)
        if image.format == "BMP" and image.mode == "RGBA" and not memory[..., 3].any():
            memory[..., 3] = 255  # many programs leave the fourth byte at 0
    is_hidden = False
    for rows in strips(height, width * 4):
        colours, opacity = _strip(image, name, memory, rows, hidden)
        if opacity is not None and opacity.min(initial=255) < 255:
            is_hidden = True
            if settings.alpha == "white":
                from edge_vlm.pictures.alpha import on_white

                colours = on_white(colours, opacity)
        pixels[rows] = colours
    return Opened(_upright(pixels, turned), settings.alpha if is_hidden else None)


def strips(height: int, row_bytes: int) -> Iterator[slice]:
    """Rows of a picture, a few megabytes at a time."""
    step = max(1, _STRIP_BYTES // row_bytes)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def _memory(image: Image.Image, name: str, max_pixels: int) -> UInt8 | None:
    """What a picture is decoded into, (h, w, 4), where its pixels take four bytes each.

    So there is never a second copy of a large picture.

    Raises:
        ImageError: the decoder would need too much besides.
    """
    from PIL import Image as Pillow

    width, height = image.size
    kind = _STORED_AS_FOUR.get(image.mode)
    n_bytes: float = 4 if kind else 3 + {"1": 1, "L": 1, "P": 1, "I;16": 2}.get(image.mode, 4)
    n_bytes += _DECODER_BYTES.get(str(image.format), 0)
    if image.format == "TIFF":  # a strip, often a few rows, sometimes the whole picture
        n_bytes += 4 * min(1, image.getexif().get(_ROWS_PER_STRIP, height) / height)
    if image.info.get("progressive") and hasattr(image, "layer"):  # 16-bit coefficients are kept
        most = max(h * v for _, h, v, _ in image.layer)
        n_bytes += 2 * sum(h * v for _, h, v, _ in image.layer) / most
    check_memory(width, height, n_bytes, str(image.format), name, max_pixels)
    if kind is None or image.format == "GIF":
        return None
    memory = np.empty((height, width, 4), np.uint8)
    image.im = Pillow.frombuffer(kind, image.size, memory, "raw", kind, 0, 1).im
    return memory


def check_memory(
    width: int, height: int, n_bytes: float, kind: str, name: str, max_pixels: int
) -> None:
    """Raise ImageError for what takes too much memory at so many bytes a pixel."""
    limit = BYTES_PER_PIXEL * max(MAX_PIXELS, max_pixels)
    if width * height * n_bytes > limit:
        raise ImageError(
            f"{label(name)}: to decode {width}x{height} pixels of this kind of {kind} takes"
            f" {width * height * n_bytes / 1e6:.0f} MB, more than {limit / 1e6:.0f}; make it"
            " smaller, save it as PNG, or raise the limit of pixels"
        )


def _strip(
    image: Image.Image,
    name: str,
    memory: UInt8 | None,
    rows: slice,
    hidden: tuple[int, ...] | None,
) -> tuple[UInt8, UInt8 | None]:
    """Some rows: colours (h, w, 3), and opacities (h, w) if the picture has any."""
    opacity: UInt8 | None = None
    if memory is not None and image.mode != "CMYK":
        part = memory[rows]
        colours = part[..., :3].copy()
        opacity = part[..., 3].copy() if image.mode in ("RGBA", "LA") else None
    else:
        strip = image.crop((0, rows.start, image.width, rows.stop))
        if image.mode.startswith(("I", "F")):
            from edge_vlm.pictures.alpha import wide_levels

            return wide_levels(np.asarray(strip), image.mode, name, hidden)
        if image.has_transparency_data and hidden is None:
            both = np.asarray(strip.convert("RGBA"))
            return both[..., :3], both[..., 3]
        colours = np.asarray(strip.convert("RGB"))
    if hidden:
        from edge_vlm.pictures.alpha import opacity_of

        opacity = opacity_of(colours, hidden)
    return colours, opacity


def _upright(pixels: UInt8, orientation: int) -> UInt8:
    """A view of a picture as EXIF says that it was held."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return pixels[rows, columns]


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Raise ImageError for a picture of more pixels than are allowed, or of none."""
    if width < 1 or height < 1:
        raise ImageError(f"{label(name)}: has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{label(name)}: has {width}x{height} = {width * height / 1e6:.0f} megapixels, more"
            f" than the limit of {max_pixels / 1e6:g}; make it smaller or raise the limit"
        )


@contextlib.contextmanager
def pillow_errors(name: str) -> Iterator[None]:
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
