"""The resizes that image processors are published with, to the last bit.

PyTorch's bilinear one: half-pixel centres, no antialiasing, ``align_corners=False``, in float32
with fused multiply-adds, which are emulated in float64: the same on every machine. Pillow's
bicubic one: antialiased, each direction rounded to 8 bit, by Pillow itself. PyTorch's bicubic one
for 8-bit pictures, which is Pillow's with coarser weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import ImageError

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Size = tuple[int, int]  # height, width

_A = -0.5  # of the bicubic kernel
MAX_SIDE = 65_535  # a JPEG's; what a resize takes grows with the longer side
_LINES = 64  # computed at a time, of so many
_BLOCK = 1 << 19  # values: small enough for a processor's cache
_STRIP = 1 << 20  # pixels turned at a time


def check_sides(width: int, height: int) -> None:
    """Whether a picture can be resized in bounded memory.

    Raises:
        ImageError: one side is longer than 65,535 pixels.
    """
    if max(height, width) > MAX_SIDE:
        raise ImageError(
            f"the picture is {width}x{height} pixels: one side is longer than {MAX_SIDE};"
            " make it smaller or crop it first"
        )


def is_reduced(size_hw: tuple[int, int], resized_hw: tuple[int, int], patch: int) -> bool:
    """Whether a resize leaves out pixels; rounding to whole patches moves a side by half of one."""
    return any(side - used > patch / 2 for side, used in zip(size_hw, resized_hw, strict=True))


def resize_bilinear(pixels: npt.NDArray[np.generic], height: int, width: int) -> Float32:
    """Bilinear resize of (h, w, channels) to float32 (height, width, channels), not rounded."""
    top, bottom, w_top, w_bottom = _axis(pixels.shape[0], height)
    left, right, w_left, w_right = _axis(pixels.shape[1], width)
    # Along x only for the rows that are read: fewer than there are when a picture shrinks a lot.
    rows, position = np.unique(np.concatenate((top, bottom)), return_inverse=True)
    source = pixels[rows]
    across = np.empty((len(rows), width, pixels.shape[2]), np.float32)
    step = max(1, (1 << 20) // max(1, width))  # bounds the float64 temporaries
    for start in range(0, len(rows), step):
        part = source[start : start + step].astype(np.float32)
        across[start : start + step] = _lerp(
            part[:, left], part[:, right], w_left[None, :, None], w_right[None, :, None]
        )
    top, bottom = position[:height], position[height:]
    out = np.empty((height, width, pixels.shape[2]), np.float32)
    for start in range(0, height, step):
        part_rows = slice(start, start + step)
        out[part_rows] = _lerp(
            across[top[part_rows]],
            across[bottom[part_rows]],
            w_top[part_rows, None, None],
            w_bottom[part_rows, None, None],
        )
    return out


def resize_bicubic(pixels: UInt8, height: int, width: int) -> UInt8:
    """Bicubic resize of (h, w, 3) to (height, width, 3)."""
    n_rows, n_columns = pixels.shape[:2]
    # Pillow 13's order, https://github.com/python-pillow/Pillow/pull/9549, whichever is installed.
    vertical_first = n_rows - height > 2 * max(0, n_columns - width)
    first, second = ((0, height), (1, width)) if vertical_first else ((1, width), (0, height))
    return _resize_along(*second, _resize_along(*first, pixels))


def resize_bicubic_part(pixels: UInt8, size: Size, start: Size, part: Size) -> UInt8:
    """A rectangle of ``resize_bicubic``, to the last bit; all sizes are (height, width).

    Of a picture that grows no more is computed than that needs: a strip of 20 x 7000 pixels whose
    short side becomes 336 would have 40 megapixels.
    """
    rows, columns = (slice(first, first + n) for first, n in zip(start, part, strict=True))
    if size[0] < pixels.shape[0] or size[1] < pixels.shape[1]:
        return resize_bicubic(pixels, *size)[rows, columns]
    down, across = (
        _taps(n, new, cut)
        for n, new, cut in zip(pixels.shape[:2], size, (rows, columns), strict=True)
    )
    needed = pixels[down[0].min() : down[0].max() + 1]
    return _grow_along(0, (down[0] - down[0].min(), down[1]), _grow_along(1, across, needed))


def _taps(n_in: int, size: int, part: slice) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int32]]:
    """For each place of ``part``, (n, 5): neighbours, and their weights in 22 bits, as Pillow's."""
    centres = (np.arange(part.start, part.stop) + 0.5) * (n_in / size)
    first = np.maximum((centres - 2 + 0.5).astype(np.intp), 0)
    last = np.minimum((centres + 2 + 0.5).astype(np.intp), n_in)
    taps = first[:, None] + np.arange(5)
    weights = _bicubic(taps - centres[:, None] + 0.5)
    weights[taps >= last[:, None]] = 0
    total = np.zeros(len(weights))
    for column in weights.T:  # in this order: the sum decides the last bit
        total += column
    scaled = weights / total[:, None] * (1 << 22)
    fixed = np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int32)
    return np.minimum(taps, n_in - 1), fixed


def _grow_along(
    axis: int, taps: tuple[npt.NDArray[np.intp], npt.NDArray[np.int32]], pixels: UInt8
) -> UInt8:
    """Weighted sums of neighbours along one axis, rounded to 8 bit."""
    shape = [1, 1, 1]
    shape[axis] = -1
    total = np.int32(1 << 21)
    for tap, weight in zip(taps[0].T, taps[1].T, strict=True):
        total = total + pixels.take(tap, axis) * weight.reshape(shape)
    levels: UInt8 = np.clip(total >> 22, 0, 255).astype(np.uint8)
    return levels


def _bicubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Pillow's filter, a = -0.5, with its order of operations."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _resize_along(axis: int, size: int, pixels: UInt8) -> UInt8:
    """Along one axis, in strips: of a whole large picture Pillow would hold two more copies."""
    from PIL import Image

    if pixels.shape[axis] == size:
        return pixels
    across = 1 - axis
    shape = list(pixels.shape)
    shape[axis] = size
    out = np.empty(shape, np.uint8)
    step = max(1, (1 << 22) // max(pixels.shape[axis], size))
    for start in range(0, pixels.shape[across], step):
        part = (slice(None),) * across + (slice(start, start + step),)
        strip = Image.fromarray(np.ascontiguousarray(pixels[part]))
        n_across = strip.size[axis]  # Pillow's sizes are (width, height)
        target = (n_across, size) if axis == 0 else (size, n_across)
        out[part] = np.asarray(strip.resize(target, Image.Resampling.BICUBIC))
    return out


def resize_bicubic_8bit(pixels: UInt8, height: int, width: int) -> UInt8:
    """Bicubic antialiased resize of (h, w, 3) to (height, width, 3), as torchvision's of uint8.

    Horizontally, then vertically; a direction of equal size is left out.
    """
    n_rows, n_columns = pixels.shape[:2]
    if n_columns != width:
        across = np.empty((n_rows, width, 3), np.uint8)
        step = max(1, _STRIP // max(n_columns, width))
        for start in range(0, n_rows, step):
            strip = pixels[start : start + step].swapaxes(0, 1)
            lines = _weighed(np.ascontiguousarray(strip).reshape(n_columns, -1), width)
            across[start : start + step] = lines.reshape(width, -1, 3).swapaxes(0, 1)
        pixels = across
    if n_rows != height:
        lines = _weighed(np.ascontiguousarray(pixels).reshape(n_rows, -1), height)
        pixels = lines.reshape(height, width, 3)
    return pixels


def _weighed(lines: UInt8, n_out: int) -> UInt8:
    """(n_out, m): each line a weighed mean of those of (n_in, m) around it, rounded to 8 bit."""
    first, weights, precision = _bicubic_weights(len(lines), n_out)
    taps = np.minimum(first[:, None] + np.arange(weights.shape[1]), len(lines) - 1)
    out = np.empty((n_out, lines.shape[1]), np.uint8)
    for start in range(0, n_out, _LINES):
        rows = slice(start, start + _LINES)
        low, high = taps[rows].min(), taps[rows].max() + 1
        step = max(1, _BLOCK // max(high - low, _LINES))
        for left in range(0, lines.shape[1], step):
            part = lines[low:high, left : left + step].astype(np.int32)
            sums = np.full((len(taps[rows]), part.shape[1]), 1 << (precision - 1), np.int32)
            for index, weight in zip(taps[rows].T - low, weights[rows].T, strict=True):
                sums += part[index] * weight[:, None]
            sums >>= precision
            out[rows, left : left + step] = np.clip(sums, 0, 255, out=sums)
    return out


def _bicubic_weights(
    n_in: int, n_out: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int32], int]:
    """First input of each output position, its whole-number weights, and the bits they are of.

    The weights are (n_out, most taps); they add up to about 2**bits, of which there are as many as
    fit a weight into 16 bit, at most 22.
    """
    scale = n_in / n_out
    stretch = max(scale, 1.0)
    support = 2 * stretch
    centres = scale * (np.arange(n_out) + 0.5)
    first = np.maximum((centres - support + 0.5).astype(np.intp), 0)
    n_taps = np.minimum((centres + support + 0.5).astype(np.intp), n_in) - first
    taps = np.arange(n_taps.max())
    distance = np.abs((taps + first[:, None] - centres[:, None] + 0.5) * (1 / stretch))
    near = ((_A + 2) * distance - (_A + 3)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * _A
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    weights[taps >= n_taps[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    largest = weights.max()
    precision = max(p for p in range(23) if int(0.5 + largest * (1 << p)) < 1 << 15)
    weights *= 1 << precision
    return first, np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32), precision


def _axis(
    n_in: int, n_out: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Float32, Float32]:
    """Indices of the two neighbours of each output position along one axis, and their weights."""
    scale = np.float32(n_in) / np.float32(n_out)
    centres = np.arange(n_out, dtype=np.float32) + np.float32(0.5)
    # One rounding, as a fused multiply-add has: float64 holds the product exactly.
    position = (centres.astype(np.float64) * np.float64(scale) - 0.5).astype(np.float32)
    position = np.maximum(position, np.float32(0))
    first = np.minimum(position.astype(np.intp), n_in - 1)
    second = np.minimum(first + 1, n_in - 1)
    w_second = np.clip(position - first.astype(np.float32), 0, 1).astype(np.float32)
    return first, second, np.float32(1) - w_second, w_second


def _lerp(first: Float32, second: Float32, w_first: Float32, w_second: Float32) -> Float32:
    """fma(first, w_first, second * w_second) with the two roundings of float32."""
    out = np.multiply(first, w_first, dtype=np.float64)
    out += second * w_second
    result: Float32 = out.astype(np.float32)
    return result
