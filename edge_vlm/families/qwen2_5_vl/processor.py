"""Qwen2.5-VL's image processor as a bundle's manifest states it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from edge_vlm.families.base import ImageProcessor
from edge_vlm.families.parts import Count

Level = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=10)]
Pixels = Annotated[int, Field(ge=1, le=1 << 26)]

_TILE_BLOCKS = 16  # a side of what limits and measurements count, in blocks


class QwenImageProcessor(ImageProcessor):
    """How a picture becomes patches; sizes in pixels.

    ``merge_size`` patches each way are a block, which becomes one vector. ``min_pixels`` and
    ``max_pixels`` are what a picture is resized to stay between. Layers of the tower that are not
    among its ``n_full_layers`` see no further than a window.

    A picture is one crop of any size. What limits and measurements call a tile is as many pixels
    as a square of 16 x 16 blocks has, wherever they lie.
    """

    family: ClassVar[str] = "qwen2.5-vl"
    any_size: ClassVar[bool] = True

    patch_size: Count
    merge_size: Annotated[int, Field(ge=1, le=16)]
    window_size: Count
    n_full_layers: Annotated[int, Field(ge=0, le=1 << 10)]
    min_pixels: Pixels
    max_pixels: Pixels
    image_mean: tuple[Level, Level, Level]
    image_std: tuple[Deviation, Deviation, Deviation]

    @property
    def block_size(self) -> int:
        """A side of what becomes one vector."""
        return self.patch_size * self.merge_size

    @property
    def window_blocks(self) -> int:
        """A side of a window, in blocks."""
        return self.window_size // self.block_size

    @property
    def block_patches(self) -> int:
        """Patches of a block."""
        return self.merge_size**2

    @property
    def crop_shape(self) -> tuple[int, int]:
        """(n_patches, patch_values) of a tile."""
        return self.tokens_per_crop * self.block_patches, 3 * self.patch_size**2

    @property
    def tokens_per_crop(self) -> int:
        """Of a tile."""
        return _TILE_BLOCKS**2

    @property
    def tile_hw(self) -> tuple[int, int]:
        """A tile's."""
        return _TILE_BLOCKS * self.block_size, _TILE_BLOCKS * self.block_size

    @property
    def max_tiles(self) -> int:
        """What the largest picture counts."""
        return -(-self.max_pixels // self.tile_hw[0] ** 2)

    @property
    def description(self) -> str:
        """What is done with pictures."""
        most = self.max_pixels // self.block_size**2
        return f"whole, a token for {self.block_size}x{self.block_size} pixels, at most {most}"

    @model_validator(mode="after")
    def _agrees(self) -> QwenImageProcessor:
        if self.window_size % self.block_size:
            raise ValueError("window_size is not made of whole blocks")
        if not self.block_size**2 <= self.min_pixels <= self.max_pixels:
            raise ValueError("min_pixels is not between one block and max_pixels")
        return self
