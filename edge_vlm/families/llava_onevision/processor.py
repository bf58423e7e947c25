"""LLaVA-OneVision's image processor as a bundle's manifest states it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from edge_vlm.families.llava_like import AnyresProcessor


class OneVisionImageProcessor(AnyresProcessor):
    """How a picture becomes crops; sizes in pixels.

    ``max_vectors`` is how many tiles' worth of vectors a picture keeps besides its overview
    ("anyres_max_9"). A picture that is one of several is not ``tiled``.
    """

    family: ClassVar[str] = "llava-onevision"

    max_vectors: Annotated[int, Field(ge=1, le=1024)]
    tiled: bool = True

    @property
    def max_tiles(self) -> int:
        """Most crops besides the overview; the single crop of one of several pictures is a tile."""
        return super().max_tiles if self.tiled else 1
