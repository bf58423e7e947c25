"""InternVL's image processor and token ids as a bundle's manifest states them."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from edge_vlm.families.base import ImageProcessor, Tokens
from edge_vlm.families.parts import Count, TokenId

Level = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=10)]
Crops = Annotated[int, Field(ge=1, le=256)]


class InternTokens(Tokens):
    """``image`` stands for each vector of a picture, between ``start`` and ``end``."""

    start: TokenId
    end: TokenId


class InternImageProcessor(ImageProcessor):
    """How a picture becomes crops; sizes in pixels.

    It becomes ``min_crops`` to ``max_crops`` tiles and, where those are several and
    ``use_thumbnail``, one more of the whole. ``shuffle`` x ``shuffle`` patches make a vector.
    """

    family: ClassVar[str] = "internvl"

    patch_size: Count
    tile_size: Annotated[int, Field(ge=1, le=4096)]
    min_crops: Crops
    max_crops: Crops
    use_thumbnail: bool
    shuffle: Annotated[int, Field(ge=1, le=16)]
    image_mean: tuple[Level, Level, Level]
    image_std: tuple[Deviation, Deviation, Deviation]

    @property
    def side(self) -> int:
        """Patches along one side of a crop."""
        return self.tile_size // self.patch_size

    @property
    def crop_shape(self) -> tuple[int, int]:
        """(n_patches, patch_values)."""
        return self.side**2, 3 * self.patch_size**2

    @property
    def tokens_per_crop(self) -> int:
        """A vector for each square of patches."""
        return (self.side // self.shuffle) ** 2

    @property
    def tile_hw(self) -> tuple[int, int]:
        """Pixels of one crop."""
        return self.tile_size, self.tile_size

    @property
    def max_tiles(self) -> int:
        """Most crops besides the thumbnail."""
        return self.max_crops

    @model_validator(mode="after")
    def _is_bounded(self) -> InternImageProcessor:
        if self.tile_size % (self.patch_size * self.shuffle):
            raise ValueError("tile_size is no multiple of patch_size times shuffle")
        if self.min_crops > self.max_crops:
            raise ValueError("min_crops is larger than max_crops")
        if self.max_crops * self.tile_size**2 > 1 << 26:
            raise ValueError("max_crops: as many tiles have more than 64 megapixels")
        return self
