"""LLaVA-NeXT's image processor as a bundle's manifest states it, and what it does: anyres.

A picture's resolution is chosen for itself, also when there are several, and its vectors are never
scaled down.

Source: the image processor in transformers (models/llava_next), whose arithmetic this is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from edge_vlm.families.llava_like import (
    AnyresProcessor,
    GridLayout,
    Size,
    cut_grid,
    plan_grid,
    tiles_of,
)
from edge_vlm.families.resample import check_sides

if TYPE_CHECKING:
    from edge_vlm.families.base import Tiles, UInt8


class LlavaNextImageProcessor(AnyresProcessor):
    """How a picture becomes an overview and tiles; sizes in pixels."""

    family: ClassVar[str] = "llava-next"


def plan_picture(width: int, height: int, processor: LlavaNextImageProcessor) -> GridLayout:
    """Resolution and tokens.

    Raises:
        ImageError: one side is longer than 65,535 pixels.
    """
    check_sides(width, height)
    return plan_grid(width, height, processor)


def cut_tiles(pixels: UInt8, processor: LlavaNextImageProcessor) -> Tiles:
    """Resize and cut a picture of shape (height, width, 3); values are normalised.

    Raises:
        ImageError: see ``plan_picture``.
    """
    plan = plan_picture(pixels.shape[1], pixels.shape[0], processor)
    return tiles_of(cut_grid(pixels, plan, processor), plan, processor)


def largest_pictures(processor: LlavaNextImageProcessor) -> tuple[Size, ...]:
    """(width, height) of the pictures that fill the most tiles, of which one has the most rows."""
    most = processor.max_tiles
    tile = processor.tile_size
    return tuple(
        (columns * tile, rows * tile)
        for rows, columns in processor.grids
        if math.prod((rows, columns)) == most
    )
