"""From crop embeddings to the rows that stand for a picture, and where those come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.families.resample import resize_bilinear

if TYPE_CHECKING:
    from edge_vlm.families.base import Box, Float32
    from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor
    from edge_vlm.families.llava_onevision.tiling import OneVisionLayout

_CHANNELS = 128  # scaled down at a time: all of 36 tiles would be copied twice


def pack(
    embeddings: Float32,
    markers: Float32,
    plan: OneVisionLayout,
    processor: OneVisionImageProcessor,
) -> Float32:
    """The overview's vectors, then the tiles' as one grid without padding, a newline behind a row.

    Args:
        embeddings: (n_crops, tokens_per_crop, hidden_size), the overview first.
        markers: (1, hidden_size).
        plan: the picture's layout.
        processor: what it was planned with.

    Returns:
        (n_tokens, hidden_size) float32.
    """
    hidden = embeddings.shape[-1]
    out = np.empty((plan.n_tokens, hidden), np.float32)
    out[: plan.overview_tokens] = embeddings[:1].reshape(-1, hidden)[: plan.overview_tokens]
    rest = out[plan.overview_tokens :]
    if not processor.tiled:
        rest[:-1], rest[-1] = embeddings[0], markers[0]
        return out
    rows, columns = plan.grid_hw
    lines = rest.reshape(rows, columns + 1, hidden)
    lines[:, columns] = markers
    tiles = embeddings[1:].reshape(*plan.tiling, processor.side, processor.side, hidden)
    (top, left), (n_rows, n_columns) = plan.padding_hw, plan.kept_hw
    for start in range(0, hidden, _CHANNELS):
        part = slice(start, start + _CHANNELS)
        grid = tiles[..., part].swapaxes(1, 2)
        grid = grid.reshape(*(n * processor.side for n in plan.tiling), -1)
        grid = grid[top : top + n_rows, left : left + n_columns]
        if plan.grid_hw != plan.kept_hw:
            grid = resize_bilinear(grid, rows, columns)
        lines[:, :columns, part] = grid
    return out


def tile_boxes(
    plan: OneVisionLayout, processor: OneVisionImageProcessor
) -> Iterator[tuple[Box, Box, int]]:
    """Each tile that holds a part of the picture: its extent, which is also the part used, and
    its vectors; where those are scaled down, how many have their centre in it.
    """
    spans = [_spans(plan, processor, axis) for axis in (0, 1)]
    for top, bottom, n_rows in spans[0]:
        for left, right, n_columns in spans[1]:
            box = (left, top, right, bottom)
            yield box, box, n_rows * n_columns


def _spans(
    plan: OneVisionLayout, processor: OneVisionImageProcessor, axis: int
) -> list[tuple[float, float, int]]:
    """Along one axis: where each tile begins and ends in parts of the picture, its vectors."""
    kept, used, padding = plan.kept_hw[axis], plan.grid_hw[axis], plan.padding_hw[axis]
    centres = (np.arange(used) + 0.5) * (kept / max(1, used))
    spans = []
    for tile in range(plan.tiling[axis]):
        start = max(0, tile * processor.side - padding)
        stop = min(kept, (tile + 1) * processor.side - padding)
        if start < stop:
            count = int(((start <= centres) & (centres < stop)).sum())
            spans.append((start / kept, stop / kept, count))
    return spans
