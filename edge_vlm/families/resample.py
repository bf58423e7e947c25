"""PyTorch's bilinear interpolation, to the last bit.

Half-pixel centres, no antialiasing, ``align_corners=False``, in float32 with fused multiply-adds,
which are emulated in float64: the same on every machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


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
