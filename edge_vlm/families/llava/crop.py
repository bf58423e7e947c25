"""LLaVA-1.5's image processor as a bundle's manifest states it, and what it does.

Source: CLIP's image processor in transformers (models/clip), whose arithmetic this is.
"""

from __future__ import annotations

from typing import ClassVar

from edge_vlm.families.base import Layout, Tiles, UInt8
from edge_vlm.families.llava_like import PatchProcessor, Size, tiles_of
from edge_vlm.families.resample import check_sides, is_reduced, resize_bicubic_part


class Llava15ImageProcessor(PatchProcessor):
    """A picture's short side becomes ``tile_size``, and of that the middle square is the crop.

    What lies outside is never seen.
    """

    family: ClassVar[str] = "llava-1.5"

    @property
    def max_tiles(self) -> int:
        """The crop."""
        return 1


def plan_picture(width: int, height: int, processor: Llava15ImageProcessor) -> Layout:
    """Every picture takes as many tokens.

    Raises:
        ImageError: one side is longer than 65,535 pixels.
    """
    check_sides(width, height)
    side, vectors = processor.tile_size, processor.tokens_per_crop
    shortest, longest = min(width, height), max(width, height)
    long = int(side * longest / shortest)
    resized = (side, long) if height == shortest else (long, side)
    return Layout(
        original_hw=(height, width),
        resized_hw=resized,
        tiling=(1, 1),
        is_reduced=is_reduced((height, width), resized, processor.patch_size) or long > side,
        n_crops=1,
        n_tokens=vectors,
        overview_tokens=0,
        tile_tokens=vectors,
    )


def corner(plan: Layout, processor: Llava15ImageProcessor) -> Size:
    """Where the crop begins in the resized picture: (top, left)."""
    height, width = plan.resized_hw
    return (height - processor.tile_size) // 2, (width - processor.tile_size) // 2


def cut_level(pixels: UInt8, plan: Layout, processor: Llava15ImageProcessor) -> UInt8:
    """The crop before normalisation: (1, tile_size, tile_size, 3)."""
    start = corner(plan, processor)
    return resize_bicubic_part(pixels, plan.resized_hw, start, processor.tile_hw)[None]


def cut_crop(pixels: UInt8, processor: Llava15ImageProcessor) -> Tiles:
    """Resize and crop a picture of shape (height, width, 3); values are normalised.

    Raises:
        ImageError: see ``plan_picture``.
    """
    plan = plan_picture(pixels.shape[1], pixels.shape[0], processor)
    return tiles_of(cut_level(pixels, plan, processor), plan, processor)
