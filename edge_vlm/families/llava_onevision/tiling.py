"""From a picture to crops: choice of a resolution, resize, padding, tiles, patches.

Sources: "LLaVA-OneVision: Easy Visual Task Transfer" (arXiv 2408.03326), section 3, and the image
processor in transformers (models/llava_onevision), whose arithmetic this is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import ImageError
from edge_vlm.families.base import Float32, Layout, Tiles, UInt8
from edge_vlm.families.resample import is_reduced, resize_bicubic

if TYPE_CHECKING:
    from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor

MAX_SIDE = 65_535  # a JPEG's; what a resize takes grows with the longer side
TOLERATED = 1.1  # how many times as long as allowed a side of the grid may be

Size = tuple[int, int]  # height, width, or rows, columns


@dataclass(frozen=True)
class OneVisionLayout(Layout):
    """With the tiles' vectors as one grid: which are kept, and what those are scaled down to."""

    padding_hw: Size  # rows and columns left out in front of the kept ones
    kept_hw: Size
    grid_hw: Size


def plan_picture(width: int, height: int, processor: OneVisionImageProcessor) -> OneVisionLayout:
    """As ``plan_tiling``, for what can be resized in bounded memory.

    Raises:
        ImageError: one side is longer than 65,535 pixels.
    """
    if max(height, width) > MAX_SIDE:
        raise ImageError(
            f"the picture is {width}x{height} pixels: one side is longer than {MAX_SIDE};"
            " make it smaller or crop it first"
        )
    return plan_tiling(width, height, processor)


def plan_tiling(width: int, height: int, processor: OneVisionImageProcessor) -> OneVisionLayout:
    """Decide resolution and tokens for a picture of ``width`` x ``height`` pixels."""
    side, tile = processor.side, processor.tile_size
    if processor.tiled:
        tiling = choose_grid(height, width, processor)
        resized = fit(height, width, (tiling[0] * tile, tiling[1] * tile))
        padding, kept = unpadded(height, width, (tiling[0] * side, tiling[1] * side))
        grid = scaled_down(kept, processor)
        n_overviews, n_row_ends = 1, grid[0]
    else:
        tiling, padding, kept, grid = (1, 1), (0, 0), (side, side), (side, side)
        longest = max(height, width)
        resized = (-(-height * tile // longest), -(-width * tile // longest))
        n_overviews, n_row_ends = 0, 1
    overview, tiles = n_overviews * processor.tokens_per_crop, math.prod(grid)
    return OneVisionLayout(
        original_hw=(height, width),
        resized_hw=resized,
        tiling=tiling,
        is_reduced=is_reduced((height, width), resized, processor.patch_size),
        n_crops=n_overviews + math.prod(tiling),
        n_tokens=overview + tiles + n_row_ends,
        overview_tokens=overview,
        tile_tokens=tiles,
        padding_hw=padding,
        kept_hw=kept,
        grid_hw=grid,
    )


def choose_grid(height: int, width: int, processor: OneVisionImageProcessor) -> Size:
    """(rows, columns) of tiles: most of the picture's pixels, then the least padding."""

    def fitness(grid: Size) -> tuple[int, int]:
        full_h, full_w = grid[0] * processor.tile_size, grid[1] * processor.tile_size
        scale = min(full_w / width, full_h / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - full_h * full_w

    return max(processor.grids, key=fitness)  # the first of equal ones


def fit(height: int, width: int, full: Size) -> Size:
    """The size at which a picture fills a canvas of ``full`` pixels in one direction."""
    full_h, full_w = full
    scale_h, scale_w = full_h / height, full_w / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), full_h), full_w
    return full_h, min(math.ceil(width * scale_h), full_w)


def unpadded(height: int, width: int, grid: Size) -> tuple[Size, Size]:
    """Of a grid of vectors, (rows, columns) that hold padding in front, and that are kept.

    As many are left out on either side, so one of padding may stay.
    """
    rows, columns = grid
    if width / height > columns / rows:
        above = (rows - int(round(height * (columns / width), 7))) // 2
        return (above, 0), (rows - 2 * above, columns)
    before = (columns - int(round(width * (rows / height), 7))) // 2
    return (0, before), (rows, columns - 2 * before)


def scaled_down(kept: Size, processor: OneVisionImageProcessor) -> Size:
    """Rows and columns that a grid of vectors is reduced to, itself where it is small enough."""
    rows, columns = kept
    ratio = math.sqrt(rows * columns / (processor.max_vectors * processor.side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > TOLERATED else kept


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
    levels = cut_levels(pixels, plan, processor)
    crops = np.empty((plan.n_crops, *processor.crop_shape), np.float32)
    tables = _normalised_levels(processor)
    patch, side = processor.patch_size, processor.side
    seen = side * patch  # the convolution has no padding: what is left of a patch it does not see
    for crop, level in zip(crops, levels, strict=True):
        values = crop.reshape(side, side, 3, patch, patch)
        for channel, table in enumerate(tables):
            patches = table[level[:seen, :seen, channel]].reshape(side, patch, side, patch)
            values[:, :, channel] = patches.swapaxes(1, 2)
    return Tiles(plan, crops)


def cut_levels(pixels: UInt8, plan: OneVisionLayout, processor: OneVisionImageProcessor) -> UInt8:
    """The crops before normalisation: (n_crops, tile_size, tile_size, 3), the overview first."""
    tile = processor.tile_size
    if not processor.tiled:
        return _squared(pixels, processor)[None]
    (rows, columns), (height, width) = plan.tiling, plan.resized_hw
    canvas = np.zeros((rows * tile, columns * tile, 3), np.uint8)  # padding is black
    top, left = (rows * tile - height) // 2, (columns * tile - width) // 2
    canvas[top : top + height, left : left + width] = resize_bicubic(pixels, height, width)
    tiles = canvas.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    overview = resize_bicubic(pixels, tile, tile)
    return np.concatenate((overview[None], tiles.reshape(-1, tile, tile, 3)))


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


def _normalised_levels(processor: OneVisionImageProcessor) -> Float32:
    """(3, 256): what becomes of each 8-bit level of a channel."""
    unit = (np.arange(256) * (1 / 255)).astype(np.float32)
    mean = np.array(processor.image_mean, np.float32)[:, None]
    std = np.array(processor.image_std, np.float32)[:, None]
    normalised: Float32 = (unit - mean) / std
    return normalised
