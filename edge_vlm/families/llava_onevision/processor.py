"""LLaVA-OneVision's image processor as a bundle's manifest states it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from edge_vlm.families.base import ImageProcessor
from edge_vlm.families.parts import Count

Grid = tuple[Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]]
Level = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=10)]


class OneVisionImageProcessor(ImageProcessor):
    """How a picture becomes crops; sizes in pixels.

    ``grids`` are the resolutions to choose from, (rows, columns) of tiles, in the checkpoint's
    order, which decides between equals. ``max_vectors`` is how many tiles' worth of vectors a
    picture keeps besides its overview ("anyres_max_9"). A picture that is one of several is not
    ``tiled``.
    """

    family: ClassVar[str] = "llava-onevision"

    patch_size: Count
    tile_size: Annotated[int, Field(ge=1, le=4096)]
    grids: tuple[Grid, ...] = Field(min_length=1, max_length=256)
    max_vectors: Annotated[int, Field(ge=1, le=1024)]
    image_mean: tuple[Level, Level, Level]
    image_std: tuple[Deviation, Deviation, Deviation]
    tiled: bool = True

    @property
    def side(self) -> int:
        """Patches along one side of a crop; pixels beyond the last whole one are not seen."""
        return self.tile_size // self.patch_size

    @property
    def crop_shape(self) -> tuple[int, int]:
        """(n_patches, patch_values)."""
        return self.side**2, 3 * self.patch_size**2

    @property
    def tokens_per_crop(self) -> int:
        """A vector for each patch."""
        return self.side**2

    @property
    def tile_hw(self) -> tuple[int, int]:
        """Pixels of one crop."""
        return self.tile_size, self.tile_size

    @property
    def max_tiles(self) -> int:
        """Most crops besides the overview; the single crop of one of several pictures is a tile."""
        return max(rows * columns for rows, columns in self.grids) if self.tiled else 1

    @model_validator(mode="after")
    def _is_bounded(self) -> OneVisionImageProcessor:
        if self.patch_size > self.tile_size:
            raise ValueError("patch_size is larger than tile_size")
        if self.max_tiles * self.tile_size**2 > 1 << 26:
            raise ValueError("grids: the largest has more than 64 megapixels")
        return self
