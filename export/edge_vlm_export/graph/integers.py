"""Rounding weights to integers: eight bits a channel, eight or four bits a block.

A weight comes as (out, in). "Channel" is a row of it, all that one output value is made of; "block"
a run of values inside a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Float32

Int8 = npt.NDArray[np.int8]
UInt8 = npt.NDArray[np.uint8]
BLOCK_ROWS = 1 << 22  # values worked on at a time
_TINY = np.float32(1e-30)  # smaller values count as zero: their scales would lose all precision
# Scales tried for a block of four bits, as fractions of the one that just holds its largest value.
_FRACTIONS = np.linspace(0.72, 1.08, 10, dtype=np.float32)


def int8_channels(weight: Float32) -> tuple[Int8, Float32]:
    """Symmetric integers (out, in) in [-127, 127] and the scale of each row (out,)."""
    scale = _positive(np.abs(weight).max(axis=1) / np.float32(127))
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


def int8_blocks(weight: Float32, block: int) -> tuple[Int8, Float32]:
    """Symmetric integers (out, n_blocks, block) and scales (out, n_blocks); zeros fill the end."""
    blocks = _blocks(weight, block)
    scale = _positive(np.abs(blocks).max(axis=2) / np.float32(127))
    return np.rint(blocks / scale[..., None]).astype(np.int8), scale


def int4_blocks(
    weight: Float32, block: int, importance: Float32 | None = None
) -> tuple[Int8, Float32]:
    """Integers (out, n_blocks, block) in [-8, 7] and scales (out, n_blocks).

    The value of largest magnitude gets -8 or nearly that; of several scales the one with the least
    squared error is taken, weighted with ``importance`` (in,), the mean square of the inputs.
    """
    n_rows = max(1, BLOCK_ROWS // weight.shape[1])
    shape = (weight.shape[0], -(-weight.shape[1] // block))
    values, scales = np.empty((*shape, block), np.int8), np.empty(shape, np.float32)
    weights = None if importance is None else _blocks(importance[None], block)
    for start in range(0, len(weight), n_rows):
        rows = slice(start, start + n_rows)
        values[rows], scales[rows] = _best_int4(_blocks(weight[rows], block), weights)
    return values, scales


def pack_nibbles(values: npt.NDArray[Any]) -> UInt8:
    """Two four-bit values a byte along the last axis, the first one in the lower half."""
    low, high = values[..., 0::2], values[..., 1::2]
    return (low & 15 | (high & 15) << 4).astype(np.uint8)


def _best_int4(blocks: Float32, weights: Float32 | None) -> tuple[Int8, Float32]:
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    full = np.where(np.abs(largest) < _TINY, 1, largest / -8).astype(np.float32)
    best_scale = full.copy()
    least = np.full(full.shape, np.inf, np.float32)
    # With -8 at the largest value; the last one has its magnitude at 7.
    for scale in (*(full * fraction for fraction in _FRACTIONS), np.abs(full) * np.float32(8 / 7)):
        error = np.clip(np.rint(blocks / scale[..., None]), -8, 7) * scale[..., None] - blocks
        error *= error
        if weights is not None:
            error *= weights
        total = error.sum(axis=2)
        better = total < least
        best_scale[better], least[better] = scale[better], total[better]
    return np.clip(np.rint(blocks / best_scale[..., None]), -8, 7).astype(np.int8), best_scale


def _blocks(weight: Float32, block: int) -> Float32:
    missing = -weight.shape[1] % block
    return np.pad(weight, ((0, 0), (0, missing))).reshape(len(weight), -1, block)


def _positive(scale: Float32) -> Float32:
    """Rows of zeros get the scale 1."""
    return np.where(scale > _TINY, scale, 1).astype(np.float32)
