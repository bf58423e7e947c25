"""From a picture to crops and back: choice of a grid, resize, patches; rows of the token block.

Sources: "How Far Are We to GPT-4V?" (arXiv 2404.16821), section 3.3, and the image processor that
InternVL has in transformers (models/got_ocr2), whose arithmetic this is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.families.base import Box, Float32, Int32, Layout, Tiles, UInt8
from edge_vlm.families.resample import check_sides, is_reduced, resize_bicubic_8bit

if TYPE_CHECKING:
    from edge_vlm.families.internvl.processor import InternImageProcessor, InternTokens

_MARKERS = 2  # <img> and </img>
_FILLED = 0.5  # of a larger grid's pixels, that a picture has more than

Size = tuple[int, int]  # height, width, or rows, columns


def plan_picture(width: int, height: int, processor: InternImageProcessor) -> Layout:
    """As ``plan_tiling``, for what can be resized in bounded time.

    Raises:
        ImageError: one side is longer than 65,535 pixels.
    """
    check_sides(width, height)
    return plan_tiling(width, height, processor)


def plan_tiling(width: int, height: int, processor: InternImageProcessor) -> Layout:
    """Decide tiles and tokens for a picture of ``width`` x ``height`` pixels."""
    rows, columns = choose_grid(height, width, processor)
    resized = (rows * processor.tile_size, columns * processor.tile_size)
    n_tiles = rows * columns
    n_thumbnails = int(processor.use_thumbnail and n_tiles > 1)
    per_crop = processor.tokens_per_crop
    return Layout(
        original_hw=(height, width),
        resized_hw=resized,
        tiling=(rows, columns),
        is_reduced=is_reduced((height, width), resized, processor.patch_size),
        n_crops=n_tiles + n_thumbnails,
        n_tokens=(n_tiles + n_thumbnails) * per_crop + _MARKERS,
        overview_tokens=n_thumbnails * per_crop,
        tile_tokens=n_tiles * per_crop,
    )


def choose_grid(height: int, width: int, processor: InternImageProcessor) -> Size:
    """(rows, columns) of the nearest aspect ratio; of equal ones the last that a picture fills."""
    best, nearest = (1, 1), math.inf
    for rows, columns in _grids(processor.min_crops, processor.max_crops):
        distance = abs(width / height - columns / rows)
        pixels = processor.tile_size**2 * rows * columns
        if distance < nearest or (distance == nearest and width * height > _FILLED * pixels):
            best, nearest = (rows, columns), distance
    return best


@cache
def _grids(least: int, most: int) -> tuple[Size, ...]:
    """(rows, columns) with the fewest tiles first; of as many, the fewest columns."""
    sides = range(1, most + 1)
    found = [(r, c) for c in sides for r in sides if least <= r * c <= most]
    return tuple(sorted(found, key=math.prod))


def largest_pictures(processor: InternImageProcessor) -> tuple[Size]:
    """(width, height) of a picture with the most tiles."""
    rows, columns = _grids(processor.min_crops, processor.max_crops)[-1]
    return ((columns * processor.tile_size, rows * processor.tile_size),)


def cut_tiles(pixels: UInt8, processor: InternImageProcessor) -> Tiles:
    """Resize and cut a picture of shape (height, width, 3); values are normalised.

    Raises:
        ImageError: see ``plan_picture``.
    """
    plan = plan_picture(pixels.shape[1], pixels.shape[0], processor)
    crops = np.empty((plan.n_crops, *processor.crop_shape), np.float32)
    tables = _normalised_levels(processor)
    patch, side = processor.patch_size, processor.side
    for crop, level in zip(crops, cut_levels(pixels, plan, processor), strict=True):
        values = crop.reshape(side, side, 3, patch, patch)
        for channel, table in enumerate(tables):
            patches = table[level[:, :, channel]].reshape(side, patch, side, patch)
            values[:, :, channel] = patches.swapaxes(1, 2)
    return Tiles(plan, crops)


def cut_levels(pixels: UInt8, plan: Layout, processor: InternImageProcessor) -> UInt8:
    """The crops before normalisation: (n_crops, tile_size, tile_size, 3), the thumbnail last."""
    tile, (rows, columns) = processor.tile_size, plan.tiling
    resized = resize_bicubic_8bit(pixels, *plan.resized_hw)
    tiles = resized.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    levels: UInt8 = tiles.reshape(-1, tile, tile, 3)
    if plan.n_crops > len(levels):
        levels = np.concatenate((levels, resize_bicubic_8bit(pixels, tile, tile)[None]))
    return levels


def _normalised_levels(processor: InternImageProcessor) -> Float32:
    """(3, 256): what becomes of each 8-bit level of a channel."""
    levels = np.arange(256, dtype=np.float32)
    mean, std = (
        np.array(values, np.float32)[:, None] * np.float32(255)
        for values in (processor.image_mean, processor.image_std)
    )
    normalised: Float32 = (levels - mean) / std
    return normalised


def rows_of(
    embeddings: Float32, markers: Float32, plan: Layout, processor: InternImageProcessor
) -> Float32:
    """<img>, every crop's vectors, </img>: (n_tokens, hidden_size)."""
    del plan, processor
    vectors = embeddings.reshape(-1, embeddings.shape[-1])
    return np.concatenate((markers[:1], vectors, markers[1:]))


def block_of(plan: Layout, processor: InternImageProcessor, tokens: InternTokens) -> Int32:
    """As many <IMG_CONTEXT> as there are vectors, between <img> and </img>."""
    del processor
    ids = np.full(plan.n_tokens, tokens.image, np.int32)
    ids[0], ids[-1] = tokens.start, tokens.end
    return ids


def tile_boxes(plan: Layout, processor: InternImageProcessor) -> Iterator[tuple[Box, Box, int]]:
    """Each tile: its extent, which is also the part used, and its vectors."""
    rows, columns = plan.tiling
    for row in range(rows):
        for column in range(columns):
            edges = column / columns, row / rows, (column + 1) / columns, (row + 1) / rows
            yield edges, edges, processor.tokens_per_crop
