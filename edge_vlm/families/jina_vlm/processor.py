"""jina-vlm's parts of a manifest: image processor, tokens, prompt."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from edge_vlm.families.base import ImageProcessor, Prompt, Tokens
from edge_vlm.families.parts import Count, Margin, Pair, TokenId


class JinaImageProcessor(ImageProcessor):
    """How a picture becomes crops; sizes in pixels, margins in patches, (height, width)."""

    family: ClassVar[str] = "jina-vlm"

    patch_size: Count
    n_channels: Literal[3] = 3
    base_input_size: Pair
    overlap_margins: tuple[Margin, Margin]
    max_crops: Annotated[int, Field(ge=1, le=1024)]
    min_pixels: Annotated[int, Field(ge=1, le=1 << 28)]
    max_pixels: Annotated[int, Field(ge=1, le=1 << 28)]
    pooling_h: Annotated[int, Field(ge=1, le=64)]
    pooling_w: Annotated[int, Field(ge=1, le=64)]
    token_length_h: Count
    token_length_w: Count
    use_column_tokens: bool

    @property
    def patches_hw(self) -> tuple[int, int]:
        """Rows and columns of patches in one crop."""
        height, width = self.base_input_size
        return height // self.patch_size, width // self.patch_size

    @property
    def n_patches(self) -> int:
        """Patches in one crop."""
        rows, columns = self.patches_hw
        return rows * columns

    @property
    def patch_values(self) -> int:
        """Values in one flattened patch: patch_size x patch_size x channels."""
        return self.patch_size**2 * self.n_channels

    @property
    def crop_shape(self) -> tuple[int, int]:
        """(n_patches, patch_values)."""
        return self.n_patches, self.patch_values

    @property
    def tile_hw(self) -> tuple[int, int]:
        """Pixels of one crop."""
        return self.base_input_size

    @property
    def max_tiles(self) -> int:
        """Most crops besides the thumbnail."""
        return self.max_crops

    @property
    def tokens_per_crop(self) -> int:
        """Vectors the connector gives for one crop."""
        return self.token_length_h * self.token_length_w

    @model_validator(mode="after")
    def _geometry_is_consistent(self) -> JinaImageProcessor:
        if any(side % self.patch_size for side in self.base_input_size):
            raise ValueError("base_input_size is not a multiple of patch_size")
        pooled = (
            math.ceil(self.patches_hw[0] / self.pooling_h),
            math.ceil(self.patches_hw[1] / self.pooling_w),
        )
        if pooled != (self.token_length_h, self.token_length_w):
            raise ValueError(
                f"token_length {self.token_length_h}x{self.token_length_w} contradicts"
                f" patches and pooling, which give {pooled[0]}x{pooled[1]}"
            )
        if any(sum(self.overlap_margins) >= n for n in self.patches_hw):
            raise ValueError("overlap_margins leave no window in a crop")
        if self.min_pixels > self.max_pixels:
            raise ValueError("min_pixels is larger than max_pixels")
        if self.n_patches * self.patch_values > 1 << 26:
            raise ValueError("a crop is larger than 64 million values")
        return self


class JinaTokens(Tokens):
    """The ids around and inside a picture's block, besides those that every family has."""

    bos: TokenId
    im_start: TokenId
    im_end: TokenId
    im_patch: TokenId
    im_col: TokenId


class JinaPrompt(Prompt):
    """The published template asks whether a turn begins with a space."""

    always_start_with_space: bool

    def template_variables(self) -> dict[str, Any]:
        """As the published processor gives them."""
        return {
            "always_start_with_space": self.always_start_with_space,
            "image_prompt_token": self.image_prompt_token,
        }
