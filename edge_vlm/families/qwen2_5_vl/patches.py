"""From a picture to patches: its new size, their order, their windows and positions.

Sources: "Qwen2.5-VL Technical Report" (arXiv 2502.13923), section 2, and the image processor and
the vision tower in transformers (models/qwen2_vl, models/qwen2_5_vl), whose arithmetic this is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import ImageError
from edge_vlm.families.base import Float32, Int32, Layout, Tiles, UInt8
from edge_vlm.families.resample import is_reduced, resize_bicubic_8bit

if TYPE_CHECKING:
    from edge_vlm.families.qwen2_5_vl.processor import QwenImageProcessor

MAX_RATIO = 200  # of the longer side to the shorter one

Int64 = npt.NDArray[np.int64]
Size = tuple[int, int]  # height, width, or rows, columns


@dataclass(frozen=True)
class QwenTiles(Tiles):
    """A picture's patches, and how the tower has to look at them."""

    arranged: Mapping[str, npt.NDArray[np.generic]]

    @property
    def tokens_per_crop(self) -> int:
        """All of the picture's."""
        return self.plan.n_tokens

    @property
    def extras(self) -> Mapping[str, npt.NDArray[np.generic]]:
        """See ``arrangement``."""
        return self.arranged


def smart_resize(height: int, width: int, processor: QwenImageProcessor) -> Size:
    """Whole blocks near the picture's size, between the least and the most pixels."""
    side = processor.block_size
    least, most = processor.min_pixels, processor.max_pixels
    new_h, new_w = round(height / side) * side, round(width / side) * side
    if new_h * new_w > most:
        shrink = math.sqrt(height * width / most)
        new_h = max(side, math.floor(height / shrink / side) * side)
        new_w = max(side, math.floor(width / shrink / side) * side)
    elif new_h * new_w < least:
        grow = math.sqrt(least / (height * width))
        new_h = math.ceil(height * grow / side) * side
        new_w = math.ceil(width * grow / side) * side
    return new_h, new_w


def plan_picture(width: int, height: int, processor: QwenImageProcessor) -> Layout:
    """Size and tokens of a picture of ``width`` x ``height`` pixels; ``tiling`` is in blocks.

    Raises:
        ImageError: one side is more than 200 times as long as the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ImageError(
            f"the picture is {width}x{height} pixels: one side is more than {MAX_RATIO} times as"
            " long as the other; crop it first"
        )
    resized = smart_resize(height, width, processor)
    rows, columns = (side // processor.block_size for side in resized)
    return Layout(
        original_hw=(height, width),
        resized_hw=resized,
        tiling=(rows, columns),
        is_reduced=is_reduced((height, width), resized, processor.block_size),
        n_crops=1,
        n_tokens=rows * columns,
        overview_tokens=0,
        tile_tokens=rows * columns,
    )


@cache
def largest_pictures(processor: QwenImageProcessor) -> tuple[Size, ...]:
    """(width, height) of a picture with the most tokens."""
    side = processor.block_size
    most = processor.max_pixels // side**2
    sizes = [(most // rows, rows) for rows in range(1, math.isqrt(most) + 1)]
    shapes = [(columns * side, rows * side) for columns, rows in sizes if columns <= 200 * rows]
    # Small and thin ones may become larger than wanted.
    shapes += [(1, 1), (MAX_RATIO, 1), (MAX_RATIO * side, side)]

    def n_pixels(shape: Size) -> int:
        height, width = smart_resize(shape[1], shape[0], processor)
        return height * width

    return (max(shapes, key=n_pixels),)


def cut_patches(pixels: UInt8, processor: QwenImageProcessor) -> QwenTiles:
    """A picture (height, width, 3) as one crop: blocks in reading order, patches inside them.

    A patch is flattened as (channel, y, x): the film of two equal frames that the published code
    makes of a picture is in the weights.

    Raises:
        ImageError: see ``plan_picture``.
    """
    plan = plan_picture(pixels.shape[1], pixels.shape[0], processor)
    levels = resize_bicubic_8bit(pixels, *plan.resized_hw)
    (rows, columns), patch, merge = plan.tiling, processor.patch_size, processor.merge_size
    crop = np.empty((1, rows * columns * merge**2, 3 * patch**2), np.float32)
    values = crop.reshape(rows, columns, merge, merge, 3, patch, patch)
    for channel, table in enumerate(normalised_levels(processor)):
        grid = table[levels[..., channel]].reshape(rows, merge, patch, columns, merge, patch)
        values[..., channel, :, :] = grid.transpose(0, 3, 1, 4, 2, 5)
    return QwenTiles(plan, crop, arrangement(plan.tiling, processor))


def normalised_levels(processor: QwenImageProcessor) -> Float32:
    """(3, 256): what becomes of each 8-bit level of a channel."""
    levels = np.arange(256, dtype=np.float32)
    scale = np.float32(255)
    mean = np.array(processor.image_mean, np.float32)[:, None] * scale
    std = np.array(processor.image_std, np.float32)[:, None] * scale
    normalised: Float32 = (levels - mean) / std
    return normalised


def arrangement(tiling: Size, processor: QwenImageProcessor) -> dict[str, npt.NDArray[np.generic]]:
    """Of a picture of so many rows and columns of blocks, as the graph takes it.

    * ``places`` (1, n_patches, 2): each patch's row and column,
    * ``windows`` (1, n_windows, window_patches): the patches of each window, any where the picture
      ends inside it,
    * ``filled``, of the same shape: whether it does not,
    * ``slots`` (1, n_patches): where each patch is among those, the windows laid end to end.
    """
    merge, window, n_sub = processor.merge_size, processor.window_blocks, processor.block_patches
    rows, columns = (axis.ravel() for axis in np.indices(tiling, np.int64))
    dy, dx = (axis.ravel() for axis in np.indices((merge, merge), np.int64))
    places = np.stack(
        ((rows[:, None] * merge + dy).ravel(), (columns[:, None] * merge + dx).ravel()), axis=-1
    )
    across, down = -(-tiling[1] // window), -(-tiling[0] // window)
    number = rows // window * across + columns // window
    inside = rows % window * window + columns % window
    slots = (number * window**2 + inside)[:, None] * n_sub + np.arange(n_sub)
    windows = np.zeros((1, down * across, window**2 * n_sub), np.int64)
    filled = np.zeros(windows.shape, np.bool_)
    windows.reshape(-1)[slots.ravel()] = np.arange(slots.size)
    filled.reshape(-1)[slots.ravel()] = True
    return {
        "places": places[None],
        "windows": windows,
        "filled": filled,
        "slots": slots.reshape(1, -1),
    }


def block_positions(plan: Layout, processor: QwenImageProcessor) -> Int32:
    """(n_tokens, 3): all at one time, then row and column of the block."""
    del processor
    rows, columns = (axis.ravel() for axis in np.indices(plan.tiling, np.int32))
    return np.stack((np.zeros_like(rows), rows, columns), axis=1)
