"""From a picture to crops, and from their embeddings to rows: anyres for one picture, a padded
square for each of several.

Sources: "LLaVA-OneVision: Easy Visual Task Transfer" (arXiv 2408.03326), section 3, and the image
processor in transformers (models/llava_onevision), whose arithmetic this is.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.families.llava_like import (
    TOLERATED,
    GridLayout,
    Size,
    cut_grid,
    pack_grid,
    plan_grid,
    tiles_of,
)
from edge_vlm.families.resample import check_sides, is_reduced, resize_bicubic

if TYPE_CHECKING:
    from edge_vlm.families.base import Float32, Tiles, UInt8
    from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor


def plan_picture(width: int, height: int, processor: OneVisionImageProcessor) -> GridLayout:
    """As ``plan_tiling``, for what can be resized in bounded memory.

    Raises:
        ImageError: one side is longer than 65,535 pixels.
    """
    check_sides(width, height)
    return plan_tiling(width, height, processor)


def plan_tiling(width: int, height: int, processor: OneVisionImageProcessor) -> GridLayout:
    """Decide resolution and tokens for a picture of ``width`` x ``height`` pixels."""
    if processor.tiled:
        return plan_grid(width, height, processor, processor.max_vectors * processor.side**2)
    tile, longest, vectors = processor.tile_size, max(height, width), processor.tokens_per_crop
    resized = (-(-height * tile // longest), -(-width * tile // longest))
    whole = (processor.side, processor.side)
    return GridLayout(
        original_hw=(height, width),
        resized_hw=resized,
        tiling=(1, 1),
        is_reduced=is_reduced((height, width), resized, processor.patch_size),
        n_crops=1,
        n_tokens=vectors + 1,
        overview_tokens=0,
        tile_tokens=vectors,
        padding_hw=(0, 0),
        kept_hw=whole,
        grid_hw=whole,
    )


@cache
def largest_pictures(processor: OneVisionImageProcessor) -> tuple[Size, ...]:
    """(width, height) of the picture with the most tokens, and of one with the most tiles.

    They differ, because the vectors of many tiles are scaled down. The most tokens have pictures
    that fill a resolution but for as much padding as keeps them from that.
    """
    tile, side = processor.tile_size, processor.side
    most = math.floor(TOLERATED**2 * processor.max_vectors * side**2)
    shapes: list[Size] = []
    for rows, columns in processor.grids:
        shapes.append((columns * tile, rows * tile))
        for extra in (-1, 0):
            n_rows = min(rows * side, most // (columns * side) + extra)
            n_columns = min(columns * side, most // (rows * side) + extra)
            shapes.append((columns * tile, max(1, n_rows * tile // side)))
            shapes.append((max(1, n_columns * tile // side), rows * tile))
    plans = {shape: plan_tiling(*shape, processor) for shape in shapes}
    by_tokens = max(shapes, key=lambda shape: plans[shape].n_tokens)
    return by_tokens, max(shapes, key=lambda shape: plans[shape].n_crops)


def cut_tiles(pixels: UInt8, processor: OneVisionImageProcessor) -> Tiles:
    """Resize and cut a picture of shape (height, width, 3); values are normalised.

    Raises:
        ImageError: see ``plan_picture``.
    """
    plan = plan_picture(pixels.shape[1], pixels.shape[0], processor)
    return tiles_of(cut_levels(pixels, plan, processor), plan, processor)


def cut_levels(pixels: UInt8, plan: GridLayout, processor: OneVisionImageProcessor) -> UInt8:
    """The crops before normalisation: (n_crops, tile_size, tile_size, 3), the overview first."""
    if processor.tiled:
        return cut_grid(pixels, plan, processor)
    return _squared(pixels, processor)[None]


def pack(
    embeddings: Float32, markers: Float32, plan: GridLayout, processor: OneVisionImageProcessor
) -> Float32:
    """The rows of a picture's block, (n_tokens, hidden_size): see ``pack_grid``; of one of several
    pictures its vectors and a newline.
    """
    if processor.tiled:
        return pack_grid(embeddings, markers, plan, processor)
    return np.concatenate((embeddings[0], markers))


def _squared(pixels: UInt8, processor: OneVisionImageProcessor) -> UInt8:
    """One crop of a picture that is padded to a square with the mean colour.

    The square itself is never held: it may be many times as large as the picture.
    """
    height, width = pixels.shape[:2]
    tile, longest = processor.tile_size, max(height, width)
    colour = np.array([int(255 * mean) for mean in processor.image_mean], np.uint8)
    top, left = (longest - height) // 2, (longest - width) // 2
    narrow = np.empty((longest, tile, 3), np.uint8)
    narrow[:] = colour
    step = max(1, (1 << 22) // longest)
    for start in range(0, height, step):
        part = pixels[start : start + step]
        strip = np.empty((len(part), longest, 3), np.uint8)
        strip[:] = colour
        strip[:, left : left + width] = part
        narrow[top + start : top + start + len(part)] = resize_bicubic(strip, len(part), tile)
    return resize_bicubic(narrow, tile, tile)
