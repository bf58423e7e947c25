"""Pixels that are hidden, wholly or in part, and arrays, which may have such."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import ImageError, label

if TYPE_CHECKING:
    from PIL import Image

UInt8 = npt.NDArray[np.uint8]


def on_white(colours: UInt8, opacity: UInt8) -> UInt8:
    """(..., 3) over white, with (...) opacities: see ``open_image``."""
    alpha = opacity[..., None].astype(np.uint16)
    sums = colours * alpha + 255 * (255 - alpha) + 128
    return ((sums + (sums >> 8)) >> 8).astype(np.uint8)  # rounded division by 255, exact


def hidden_colour(image: Image.Image) -> tuple[int, ...] | None:
    """The colour that stands for "nothing here" in a picture of greys or of RGB.

    (grey,) or (red, green, blue); those of a PNG are samples of its own depth.
    """
    found = image.info.get("transparency")
    if image.mode not in ("1", "L", "I;16", "RGB") or not isinstance(found, int | tuple):
        return None
    colour = (found,) if isinstance(found, int) else tuple(found)
    tiles = getattr(image, "tile", None)  # of a file that is not decoded yet
    raw = str(tiles[0][3]) if tiles else ""
    if raw == "RGB;16B":  # of which Pillow keeps the high byte
        return tuple(value >> 8 for value in colour)
    scale = {"L;2": 85, "L;4": 17}.get(raw, 1)
    return tuple(value * scale for value in colour)


def with_fourth_byte(image: Any) -> None:
    """Read the fourth byte of a BMP's pixels, too: programs keep opacity there, or zeros."""
    tile = image.tile[0]
    if image.mode == "RGB" and tile[0] == "raw" and tile[3][0] == "BGRX":
        image._mode = "RGBA"
        image.tile = [tile._replace(args=("BGRA", *tile[3][1:]))]


def array_size(array: npt.NDArray[Any]) -> tuple[int, int]:
    """Width and height.

    Raises:
        ImageError: the array has not the shape or the numbers of a picture.
    """
    shape = array.shape
    if len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,), (4,)) or 0 in shape:
        raise ImageError(
            f"an image array has shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), not {shape}"
        )
    if array.dtype not in (np.uint8, np.uint16, np.bool_):
        raise ImageError(f"an image array is uint8, uint16 or bool, not {array.dtype}")
    return shape[1], shape[0]


def array_pixels(array: npt.NDArray[Any], alpha: str) -> tuple[UInt8, bool]:
    """(h, w, 3) of such an array, and whether some pixels of it were hidden; see ``open_image``."""
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype == np.bool_:
        array = array.view(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _high_byte(array)
    height, width, n_channels = array.shape
    if n_channels < 4:
        return np.ascontiguousarray(np.broadcast_to(array, (height, width, 3))), False
    is_hidden = bool(array[..., 3].min() < 255)
    pixels = np.ascontiguousarray(array[..., :3])
    if is_hidden and alpha == "white":
        step = max(1, (1 << 20) // width)
        for top in range(0, height, step):
            part = array[top : top + step]
            pixels[top : top + step] = on_white(part[..., :3], part[..., 3])
    return pixels, is_hidden


def wide_levels(
    values: npt.NDArray[Any], mode: str, name: str, hidden: tuple[int, ...] | None
) -> tuple[UInt8, UInt8 | None]:
    """Greys (h, w) of more than 8 bit as colours (h, w, 3), and their opacities.

    Raises:
        ImageError: they are not whole numbers of 16 bit.
    """
    if mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError(f"{label(name)}: has {mode}-mode pixels; save it as 8 or 16 bit")
    colours = np.repeat(_high_byte(values)[..., None], 3, axis=2)
    return colours, opacity_of(values[..., None], hidden)


def opacity_of(levels: npt.NDArray[Any], hidden: tuple[int, ...] | None) -> UInt8 | None:
    """(h, w): 0 where levels (h, w, n) are the hidden colour, else 255."""
    if hidden is None:
        return None
    differs = levels[..., : len(hidden)] != np.array(hidden)
    opacity: UInt8 = differs.any(axis=-1).astype(np.uint8) * np.uint8(255)
    return opacity


def _high_byte(values: npt.NDArray[Any]) -> UInt8:
    """Of 16-bit levels, as PNG readers do."""
    return (values >> 8).astype(np.uint8)
