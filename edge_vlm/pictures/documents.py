"""Pages of a PDF, frames of an animation, and HEIC: what packages read that are installed besides.

Pillow's lock is held meanwhile: PDFium is not made for several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edge_vlm.errors import ImageError, label
from edge_vlm.pictures.damage import N_BYTES, kind_of, not_read

if TYPE_CHECKING:
    from PIL import Image

_HEIC_BYTES = 13  # a pixel, while libheif decodes
_PDF_BYTES = 6
_FRAMES = 20  # times as many pixels as are allowed: each frame is drawn over those before

Check = Callable[[int, int, str, int], None]  # width, height, kind, bytes a pixel


def show_frame(image: Image.Image, part: tuple[str, int], name: str, max_pixels: int) -> None:
    """Go on to the frame that was asked for, ("frame", number).

    Raises:
        ImageError: there is none, or it is a page that was asked for.
    """
    kind, number = part
    if kind == "page":
        raise ImageError(f"{label(name)}: is {image.format}, which has no pages")
    n_frames = getattr(image, "n_frames", 1)
    if number > n_frames:
        raise ImageError(f"{label(name)}: its last frame is {n_frames}")
    if image.width * image.height * number > _FRAMES * max_pixels:
        raise ImageError(f"{label(name)}: there are too many frames of this size before it")
    image.seek(number - 1)


def render(
    file: IO[bytes],
    name: str,
    formats: Sequence[str],
    part: tuple[str, int] | None,
    dpi: int,
    check: Check,
) -> Any:
    """What Pillow does not read: a page of a PDF, (h, w, 3) uint8, or a PIL image of a HEIC.

    Args:
        file: the open file.
        name: for messages.
        formats: that are read otherwise.
        part: page and number; of a document with one page None will do.
        dpi: pixels of a page for each inch.
        check: called before pixels are made.

    Raises:
        ImageError: it is neither, cannot be read, or the package for it is not installed.
    """
    file.seek(0)
    kind = kind_of(file.read(N_BYTES)) or ("", "")
    try:
        if kind[0] == "PDF":
            return _page(file, name, part, dpi, check)
        if kind[0] == "HEIC" and part is None:
            return _heic(file, check)
    except ImportError:
        pass
    raise ImageError(f"{label(name)}: {not_read(file, formats)}")


def _heic(file: IO[bytes], check: Check) -> Image.Image:
    import pillow_heif

    file.seek(0)
    heif = pillow_heif.open_heif(file, convert_hdr_to_8bit=True)
    width, height = heif.size
    check(width, height, "HEIC", _HEIC_BYTES)
    image: Image.Image = heif.to_pillow()
    return image


def _page(file: IO[bytes], name: str, part: tuple[str, int] | None, dpi: int, check: Check) -> Any:
    import pypdfium2

    file.seek(0)
    document = pypdfium2.PdfDocument(file.read())
    try:
        n_pages = len(document)
        if part is None and n_pages > 1:
            raise ImageError(
                f"{label(name)}: has {n_pages} pages; say which behind its name, such as"
                " '#page=1' or '#page=1-3'"
            )
        kind, number = part or ("page", 1)
        if kind == "frame" or number > n_pages:
            raise ImageError(f"{label(name)}: its last page is {n_pages}")
        page = document[number - 1]
        width, height = (-(-side * dpi // 72) for side in page.get_size())
        check(int(width), int(height), f"PDF at {dpi} dpi", _PDF_BYTES)
        drawn = page.render(scale=dpi / 72, rev_byteorder=True).to_numpy()
        return np.ascontiguousarray(np.broadcast_to(drawn[..., :3], (*drawn.shape[:2], 3)))
    finally:
        document.close()
