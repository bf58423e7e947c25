"""The toy model's vision tower in numpy: it costs nothing and tells every crop from every other.

A crop's patches are projected, averaged in windows of two by two as the real connector pools them,
and a vector is added to the last crop. ``make_vision.py`` writes the same as a graph.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tests.toy.sizes import HIDDEN, N_MARKERS, PROCESSOR

Float32 = npt.NDArray[np.float32]


def waves(*shape: int) -> Float32:
    """Numbers in [-1, 1] that are the same everywhere, as random ones need not be."""
    n_values = int(np.prod(shape))
    return np.sin(np.arange(1, n_values + 1) * 1.7).astype(np.float32).reshape(shape)


def pooling() -> Float32:
    """(tokens, patches): the mean of the patches in each window; at the edges there are fewer."""
    rows, columns = PROCESSOR.patches_hw
    high, wide = PROCESSOR.token_length_h, PROCESSOR.token_length_w
    found = np.zeros((high * wide, rows * columns), np.float32)
    for patch in range(rows * columns):
        row, column = divmod(patch, columns)
        found[row // PROCESSOR.pooling_h * wide + column // PROCESSOR.pooling_w, patch] = 1
    means: Float32 = found / found.sum(axis=1, keepdims=True)
    return means


PROJECTION = waves(PROCESSOR.patch_values, HIDDEN) / np.float32(PROCESSOR.patch_values)
POOLING = pooling()
LAST = waves(1, HIDDEN)[:, ::-1] / np.float32(4)
MARKERS = waves(N_MARKERS, HIDDEN)


def embed(crops: Float32, is_last: npt.NDArray[np.bool_]) -> Float32:
    """(n, tokens_per_crop, hidden_size) of (n, n_patches, patch_values)."""
    rows = POOLING @ (crops @ PROJECTION)
    found: Float32 = rows + is_last[:, None, None].astype(np.float32) * LAST
    return found
