"""Pixtral's image processor as a bundle's manifest states it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from edge_vlm.families.base import ImageProcessor
from edge_vlm.families.parts import Count

Level = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=10)]

_TILE_PATCHES = 16  # a side of what limits and measurements count, in patches


class PixtralImageProcessor(ImageProcessor):
    """How a picture becomes patches; sizes in pixels.

    A picture is as large as it is, up to ``longest_edge``; its sides are then rounded up to whole
    patches. ``max_patches`` is what one has at most where a user wants fewer than fit that edge.

    A picture is one crop of any size. What limits and measurements call a tile is as many pixels
    as a square of 16 x 16 patches has, wherever they lie.
    """

    family: ClassVar[str] = "pixtral"
    any_size: ClassVar[bool] = True

    patch_size: Count
    longest_edge: Annotated[int, Field(ge=1, le=1 << 14)]
    max_patches: Count
    image_mean: tuple[Level, Level, Level]
    image_std: tuple[Deviation, Deviation, Deviation]

    @property
    def side_patches(self) -> int:
        """Patches along the longest side there is."""
        return -(-self.longest_edge // self.patch_size)

    @property
    def crop_shape(self) -> tuple[int, int]:
        """(n_patches, patch_values) of a tile."""
        return self.tokens_per_crop, 3 * self.patch_size**2

    @property
    def tokens_per_crop(self) -> int:
        """Of a tile."""
        return _TILE_PATCHES**2

    @property
    def tile_hw(self) -> tuple[int, int]:
        """A tile's."""
        return _TILE_PATCHES * self.patch_size, _TILE_PATCHES * self.patch_size

    @property
    def max_tiles(self) -> int:
        """What the largest picture counts."""
        return -(-self.max_patches // self.tokens_per_crop)

    @property
    def description(self) -> str:
        """What is done with pictures."""
        side, edge = self.patch_size, self.longest_edge
        most = f"{self.max_patches} and an end for each row"
        return (
            f"whole, at most {edge} wide or high, a token for {side}x{side} pixels, at most {most}"
        )

    @model_validator(mode="after")
    def _agrees(self) -> PixtralImageProcessor:
        if self.max_patches > self.side_patches**2:
            raise ValueError("max_patches is more than longest_edge allows")
        return self
