"""jina-vlm's parts of a manifest, and from a picture to crops: resize, tiling, token layout.

The arithmetic is the published one, to the last bit (see ``resample``). It matters because the
first resize rounds to whole grey levels, where exact halves are common.
Source: "jina-vlm: Small Multilingual Vision Language Model" (arXiv 2512.04032), section 3, and
the tiling of Molmo (arXiv 2409.17146) that it builds on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from edge_vlm.errors import ImageError
from edge_vlm.families.base import Box, ImageProcessor, Layout, Prompt, Tiles, Tokens
from edge_vlm.families.parts import Count, Margin, Pair, TokenId
from edge_vlm.families.resample import resize_bilinear


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


MAX_ASPECT_RATIO = 200
NOT_USED = -1

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TilingPlan(Layout):
    """With the grids that jina-vlm needs besides."""

    tiled_hw: tuple[int, int]
    thumbnail_hw: tuple[int, int]  # rows, columns of vectors kept from the thumbnail
    grid_hw: tuple[int, int]  # the same for all crops together

    @property
    def n_patch_tokens(self) -> int:
        """Positions that carry an image vector."""
        return self.overview_tokens + self.tile_tokens


@dataclass(frozen=True)
class JinaTiles(Tiles):
    """The thumbnail is crop 0; values are in [-1, 1]."""

    plan: TilingPlan

    @cached_property
    def is_last(self) -> npt.NDArray[np.bool_]:
        """(n_crops,): true for the last crop, whose patches all get the partial-padding vector.

        The published code appends the thumbnail's mask at the end while the thumbnail itself goes
        to the front, so the mask meant for it lands on the last crop. The model was trained so.
        """
        last = np.zeros(len(self.crops), np.bool_)
        last[-1] = True
        return last

    @property
    def extras(self) -> Mapping[str, npt.NDArray[Any]]:
        """Which crop is the last."""
        return {"is_last": self.is_last}


def plan_tiling(height: int, width: int, settings: JinaImageProcessor) -> TilingPlan:
    """Decide resize and tiling for a picture of ``height`` x ``width`` pixels.

    Raises:
        ImageError: the longer side is more than 200 times the shorter one.
    """
    resized = smart_resize(height, width, settings)
    rows, columns = choose_tiling(resized, settings)
    window_h, window_w = _window(settings)
    overlap = sum(settings.overlap_margins) * settings.patch_size
    thumbnail_hw = settings.token_length_h, settings.token_length_w
    grid_hw = (
        sum(count for _, count in kept_rows(rows, settings, axis=0)),
        sum(count for _, count in kept_rows(columns, settings, axis=1)),
    )
    n_vectors = math.prod(thumbnail_hw), math.prod(grid_hw)
    row_ends = thumbnail_hw[0] + grid_hw[0] if settings.use_column_tokens else 0
    return TilingPlan(
        original_hw=(height, width),
        resized_hw=resized,
        tiling=(rows, columns),
        n_crops=rows * columns + 1,
        n_tokens=sum(n_vectors) + row_ends + 4,  # each of two blocks has a beginning and an end
        overview_tokens=n_vectors[0],
        tile_tokens=n_vectors[1],
        tiled_hw=(rows * window_h + overlap, columns * window_w + overlap),
        thumbnail_hw=thumbnail_hw,
        grid_hw=grid_hw,
        # Rounding to whole patches moves a side by at most half a patch.
        is_reduced=any(
            side - used > settings.patch_size / 2
            for side, used in zip((height, width), resized, strict=True)
        ),
    )


def cut_tiles(pixels: UInt8, settings: JinaImageProcessor) -> JinaTiles:
    """Resize a picture of shape (height, width, 3), cut it and flatten the patches.

    Raises:
        ImageError: see ``plan_tiling``.
    """
    height, width = pixels.shape[:2]
    plan = plan_tiling(height, width, settings)
    base_h, base_w = settings.base_input_size
    window_h, window_w = _window(settings)

    levels = np.rint(resize_bilinear(pixels, *plan.resized_hw))
    resized = levels.astype(np.uint8).astype(np.float32) / np.float32(255)
    tiled = _to_signed(resize_bilinear(resized, *plan.tiled_hw))
    crops = np.empty((plan.n_crops, settings.n_patches, settings.patch_values), np.float32)
    crops[0] = _patches(_to_signed(resize_bilinear(resized, base_h, base_w)), settings.patch_size)
    rows, columns = plan.tiling
    for row in range(rows):
        for column in range(columns):
            top, left = row * window_h, column * window_w
            crop = tiled[top : top + base_h, left : left + base_w]
            crops[1 + row * columns + column] = _patches(crop, settings.patch_size)
    return JinaTiles(plan, crops)


def smart_resize(height: int, width: int, settings: JinaImageProcessor) -> tuple[int, int]:
    """The size, in whole patches and within the pixel limits, a picture is first resized to.

    Raises:
        ImageError: the longer side is more than 200 times the shorter one.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"the picture is {width}x{height} pixels: one side is more than"
            f" {MAX_ASPECT_RATIO} times the other; crop it first"
        )
    patch = settings.patch_size
    resized_h = round(height / patch) * patch
    resized_w = round(width / patch) * patch
    if resized_h * resized_w > settings.max_pixels:
        beta = math.sqrt(height * width / settings.max_pixels)
        resized_h = max(patch, math.floor(height / beta / patch) * patch)
        resized_w = max(patch, math.floor(width / beta / patch) * patch)
    elif resized_h * resized_w < settings.min_pixels:
        beta = math.sqrt(settings.min_pixels / (height * width))
        resized_h = math.ceil(height * beta / patch) * patch
        resized_w = math.ceil(width * beta / patch) * patch
    return resized_h, resized_w


def choose_tiling(resized_hw: tuple[int, int], settings: JinaImageProcessor) -> tuple[int, int]:
    """(rows, columns) of the crop grid for a resized picture.

    The first tiling that enlarges least; if all would reduce it, the one that reduces least. A
    side smaller than the overlap gives a negative scale and a side equal to it an infinite one,
    as in the published code.
    """
    limit = settings.max_crops
    candidates = sorted(
        ((r, c) for r in range(1, limit + 1) for c in range(1, limit // r + 1)),
        key=lambda rc: (rc[0] * rc[1], rc[0]),
    )
    overlap = sum(settings.overlap_margins) * settings.patch_size
    inner = np.array(resized_hw, np.float32) - np.float32(overlap)
    windows = np.array(candidates, np.float32) * np.array(_window(settings), np.float32)
    with np.errstate(divide="ignore"):
        scales = (windows / inner).min(axis=1)
    enlarging = scales >= 1
    if not enlarging.any():
        return candidates[int(np.argmax(scales))]
    return candidates[int(np.argmin(np.where(enlarging, scales, np.inf)))]


def kept_rows(n_tiles: int, settings: JinaImageProcessor, axis: int) -> list[tuple[int, int]]:
    """(start, count) of the pooled rows (axis 0) or columns (axis 1) kept from each tile.

    Neighbouring crops overlap; of the overlap each pooled vector is used once.
    """
    margins = settings.overlap_margins
    pooling = (settings.pooling_h, settings.pooling_w)[axis]
    patches = settings.patches_hw[axis]
    window = patches - sum(margins)
    kept = []
    for tile in range(n_tiles):
        n_patches = window
        n_patches += margins[0] if tile == 0 else 0
        n_patches += margins[1] if tile == n_tiles - 1 else 0
        start = 0 if tile == 0 else margins[0] // pooling
        kept.append((start, math.ceil(n_patches / pooling)))
    return kept


def token_block(plan: TilingPlan, settings: JinaImageProcessor) -> npt.NDArray[np.str_]:
    """The tokens that stand for the picture, as one-letter codes: thumbnail block, crops block.

    ``s`` <im_start>, ``p`` <im_patch>, ``c`` <im_col>, ``e`` <im_end>; shape (n_image_tokens,).
    """
    text = ""
    for rows, columns in (plan.thumbnail_hw, plan.grid_hw):
        row = "p" * columns + ("c" if settings.use_column_tokens else "")
        text += "s" + row * rows + "e"
    return np.array(list(text))


def patch_order(plan: TilingPlan, settings: JinaImageProcessor) -> Int32:
    """Which ``<im_patch>`` of the block each connector output belongs to.

    Returns:
        (n_crops, tokens_per_crop) int32: index among the picture's <im_patch> tokens, in reading
        order, or -1 for an output that is thrown away.
    """
    rows, columns = plan.tiling
    t_h, t_w = settings.token_length_h, settings.token_length_w
    order = np.full((plan.n_crops, t_h, t_w), NOT_USED, np.int32)
    n_thumbnail = t_h * t_w
    order[0] = np.arange(n_thumbnail, dtype=np.int32).reshape(t_h, t_w)
    grid = np.arange(math.prod(plan.grid_hw), dtype=np.int32).reshape(plan.grid_hw) + n_thumbnail
    top = 0
    for row, (row_start, n_rows) in enumerate(kept_rows(rows, settings, axis=0)):
        left = 0
        for column, (col_start, n_cols) in enumerate(kept_rows(columns, settings, axis=1)):
            crop = order[1 + row * columns + column]
            crop[row_start : row_start + n_rows, col_start : col_start + n_cols] = grid[
                top : top + n_rows, left : left + n_cols
            ]
            left += n_cols
        top += n_rows
    return order.reshape(plan.n_crops, t_h * t_w)


def tile_boxes(plan: TilingPlan, settings: JinaImageProcessor) -> Iterator[tuple[Box, Box, int]]:
    """Each tile in reading order: its extent, the part whose vectors are used, and their number.

    Both boxes are in parts of the picture's width and height. The used parts cover the picture
    without overlap; the extents overlap by the margins.
    """
    (rows, columns), (tiled_h, tiled_w) = plan.tiling, plan.tiled_hw
    base_h, base_w = settings.base_input_size
    margin = sum(settings.overlap_margins) * settings.patch_size
    cell_h, cell_w = plan.grid_hw
    top = 0
    for row, (_, n_rows) in enumerate(kept_rows(rows, settings, axis=0)):
        left = 0
        y = row * (base_h - margin)
        for column, (_, n_columns) in enumerate(kept_rows(columns, settings, axis=1)):
            x = column * (base_w - margin)
            extent = (x / tiled_w, y / tiled_h, (x + base_w) / tiled_w, (y + base_h) / tiled_h)
            used = (
                left / cell_w,
                top / cell_h,
                (left + n_columns) / cell_w,
                (top + n_rows) / cell_h,
            )
            yield extent, used, n_rows * n_columns
            left += n_columns
        top += n_rows


def _to_signed(unit: Float32) -> Float32:
    """Map [0, 1] to [-1, 1]."""
    signed: Float32 = unit * np.float32(2)
    signed -= np.float32(1)
    return signed


def _patches(crop: Float32, patch: int) -> Float32:
    """(h, w, 3) to (patches, patch * patch * 3): row-major patches, values in (y, x, channel)."""
    height, width, channels = crop.shape
    grid = crop.reshape(height // patch, patch, width // patch, patch, channels)
    patches: Float32 = grid.swapaxes(1, 2).reshape(-1, patch * patch * channels)
    return patches


def _window(settings: JinaImageProcessor) -> tuple[int, int]:
    """Pixels by which one crop advances to the next: (vertical, horizontal)."""
    margin = sum(settings.overlap_margins)
    rows, columns = settings.patches_hw
    return (rows - margin) * settings.patch_size, (columns - margin) * settings.patch_size
