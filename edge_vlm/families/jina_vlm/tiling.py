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
from itertools import product
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from edge_vlm.errors import ImageError
from edge_vlm.families.base import (
    Box,
    Float32,
    ImageProcessor,
    Int32,
    Layout,
    Prompt,
    Tiles,
    Tokens,
    UInt8,
)
from edge_vlm.families.parts import Count, Margin, Pair, TokenId
from edge_vlm.families.resample import is_reduced, resize_bilinear


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
        rows, columns = self.patches_hw
        pooled = -(-rows // self.pooling_h), -(-columns // self.pooling_w)
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


@dataclass(frozen=True)
class TilingPlan(Layout):
    """With the grids that jina-vlm needs besides."""

    tiled_hw: tuple[int, int]
    thumbnail_hw: tuple[int, int]  # rows, columns of vectors kept from the thumbnail
    grid_hw: tuple[int, int]  # the same for all crops together

    @property
    def used_hw(self) -> tuple[int, int]:
        """Tiles may hold fewer pixels than the picture is first resized to."""
        (height, width), (tiled_h, tiled_w) = self.resized_hw, self.tiled_hw
        return min(height, tiled_h), min(width, tiled_w)

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


def plan_picture(width: int, height: int, processor: JinaImageProcessor) -> TilingPlan:
    """Decide resize and tiling for a picture of ``width`` x ``height`` pixels.

    Raises:
        ImageError: the longer side is more than 200 times the shorter one.
    """
    resized = smart_resize(height, width, processor)
    rows, columns = choose_tiling(resized, processor)
    window_h, window_w = _window(processor)
    overlap = sum(processor.overlap_margins) * processor.patch_size
    thumbnail_hw = processor.token_length_h, processor.token_length_w
    grid_hw = kept_rows(rows, processor, 0)[-1].end, kept_rows(columns, processor, 1)[-1].end
    n_vectors = math.prod(thumbnail_hw), math.prod(grid_hw)
    row_ends = thumbnail_hw[0] + grid_hw[0] if processor.use_column_tokens else 0
    return TilingPlan(
        original_hw=(height, width),
        resized_hw=resized,
        tiling=(rows, columns),
        is_reduced=is_reduced((height, width), resized, processor.patch_size),
        n_crops=rows * columns + 1,
        n_tokens=sum(n_vectors) + row_ends + 4,  # each of two blocks has a beginning and an end
        overview_tokens=n_vectors[0],
        tile_tokens=n_vectors[1],
        tiled_hw=(rows * window_h + overlap, columns * window_w + overlap),
        thumbnail_hw=thumbnail_hw,
        grid_hw=grid_hw,
    )


def cut_tiles(pixels: UInt8, processor: JinaImageProcessor) -> JinaTiles:
    """Resize a picture of shape (height, width, 3), cut it and flatten the patches.

    Raises:
        ImageError: see ``plan_picture``.
    """
    plan = plan_picture(pixels.shape[1], pixels.shape[0], processor)
    base_h, base_w = processor.base_input_size
    window_h, window_w = _window(processor)

    levels = np.rint(resize_bilinear(pixels, *plan.resized_hw))
    resized = levels.astype(np.uint8).astype(np.float32) / np.float32(255)
    tiled = _to_signed(resize_bilinear(resized, *plan.tiled_hw))
    crops = np.empty((plan.n_crops, *processor.crop_shape), np.float32)
    crops[0] = _patches(_to_signed(resize_bilinear(resized, base_h, base_w)), processor.patch_size)
    for index, (row, column) in enumerate(np.ndindex(plan.tiling), 1):
        top, left = row * window_h, column * window_w
        crop = tiled[top : top + base_h, left : left + base_w]
        crops[index] = _patches(crop, processor.patch_size)
    return JinaTiles(plan, crops)


def smart_resize(height: int, width: int, processor: JinaImageProcessor) -> tuple[int, int]:
    """The size, in whole patches and within the pixel limits, a picture is first resized to.

    Raises:
        ImageError: the longer side is more than 200 times the shorter one.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"the picture is {width}x{height} pixels: one side is more than"
            f" {MAX_ASPECT_RATIO} times the other; crop it first"
        )
    patch = processor.patch_size
    resized_h = round(height / patch) * patch
    resized_w = round(width / patch) * patch
    if resized_h * resized_w > processor.max_pixels:
        beta = math.sqrt(height * width / processor.max_pixels)
        resized_h = max(patch, math.floor(height / beta / patch) * patch)
        resized_w = max(patch, math.floor(width / beta / patch) * patch)
    elif resized_h * resized_w < processor.min_pixels:
        beta = math.sqrt(processor.min_pixels / (height * width))
        resized_h = math.ceil(height * beta / patch) * patch
        resized_w = math.ceil(width * beta / patch) * patch
    return resized_h, resized_w


def choose_tiling(resized_hw: tuple[int, int], processor: JinaImageProcessor) -> tuple[int, int]:
    """(rows, columns) of the crop grid for a resized picture.

    The first tiling that enlarges least; if all would reduce it, the one that reduces least. A
    side smaller than the overlap gives a negative scale and a side equal to it an infinite one,
    as in the published code.
    """
    limit = processor.max_crops
    candidates = sorted(
        ((r, c) for r in range(1, limit + 1) for c in range(1, limit // r + 1)),
        key=lambda rc: (rc[0] * rc[1], rc[0]),
    )
    overlap = sum(processor.overlap_margins) * processor.patch_size
    inner = np.array(resized_hw, np.float32) - np.float32(overlap)
    windows = np.array(candidates, np.float32) * np.array(_window(processor), np.float32)
    with np.errstate(divide="ignore"):
        scales = (windows / inner).min(axis=1)
    enlarging = scales >= 1
    if not enlarging.any():
        return candidates[int(np.argmax(scales))]
    return candidates[int(np.argmin(np.where(enlarging, scales, np.inf)))]


class Kept(NamedTuple):
    """Pooled rows or columns of a tile that are used: the first, and where they go in the grid."""

    first: int
    start: int
    end: int


def kept_rows(n_tiles: int, processor: JinaImageProcessor, axis: int) -> list[Kept]:
    """The pooled rows (axis 0) or columns (axis 1) kept from each tile.

    Neighbouring crops overlap; of the overlap each pooled vector is used once.
    """
    before, behind = processor.overlap_margins
    pooling = (processor.pooling_h, processor.pooling_w)[axis]
    window = processor.patches_hw[axis] - before - behind
    kept: list[Kept] = []
    end = 0
    for tile in range(n_tiles):
        n_patches = window + before * (tile == 0) + behind * (tile == n_tiles - 1)
        start, end = end, end + math.ceil(n_patches / pooling)
        kept.append(Kept(before // pooling if tile else 0, start, end))
    return kept


def token_block(plan: TilingPlan, processor: JinaImageProcessor) -> npt.NDArray[np.str_]:
    """The tokens that stand for the picture, as one-letter codes: thumbnail block, crops block.

    ``s`` <im_start>, ``p`` <im_patch>, ``c`` <im_col>, ``e`` <im_end>; shape (n_image_tokens,).
    """
    text = ""
    for rows, columns in (plan.thumbnail_hw, plan.grid_hw):
        row = "p" * columns + ("c" if processor.use_column_tokens else "")
        text += "s" + row * rows + "e"
    return np.array(list(text))


def patch_order(plan: TilingPlan, processor: JinaImageProcessor) -> Int32:
    """Which ``<im_patch>`` of the block each connector output belongs to.

    Returns:
        (n_crops, tokens_per_crop) int32: index among the picture's <im_patch> tokens, in reading
        order, or -1 for an output that is thrown away.
    """
    t_h, t_w = plan.thumbnail_hw
    order = np.full((plan.n_crops, t_h, t_w), -1, np.int32)
    order[0] = np.arange(t_h * t_w).reshape(t_h, t_w)
    grid = np.arange(math.prod(plan.grid_hw)).reshape(plan.grid_hw) + t_h * t_w
    for crop, (rows, columns) in zip(order[1:], _kept_parts(plan, processor), strict=True):
        part = grid[rows.start : rows.end, columns.start : columns.end]
        n_rows, n_columns = part.shape
        crop[rows.first : rows.first + n_rows, columns.first : columns.first + n_columns] = part
    return order.reshape(plan.n_crops, t_h * t_w)


def stitch(
    embeddings: Float32, markers: Float32, plan: TilingPlan, processor: JinaImageProcessor
) -> Float32:
    """Embeddings of a picture's whole token block, in order.

    The markers between the patches are embedded here as well, so that a picture goes into the
    decoder as one batch instead of one small batch for each row of patches.

    Args:
        embeddings: (n_crops, tokens_per_crop, hidden_size), thumbnail first.
        markers: (3, hidden_size), rows of <im_start>, <im_col>, <im_end>.
        plan: the picture's tiling.
        processor: the bundle's.

    Returns:
        (n_image_tokens, hidden_size) float32.
    """
    block = token_block(plan, processor)
    hidden = embeddings.shape[-1]
    rows = np.empty((len(block), hidden), np.float32)
    for code, marker in zip("sce", markers, strict=True):
        rows[block == code] = marker
    order = patch_order(plan, processor).ravel()
    used = order >= 0
    rows[np.flatnonzero(block == "p")[order[used]]] = embeddings.reshape(-1, hidden)[used]
    return rows


def tile_boxes(plan: TilingPlan, processor: JinaImageProcessor) -> Iterator[tuple[Box, Box, int]]:
    """Each tile in reading order: its extent, the part whose vectors are used, and their number.

    Both boxes are in parts of the picture's width and height. The used parts cover the picture
    without overlap; the extents overlap by the margins.
    """
    (base_h, base_w), (window_h, window_w) = processor.base_input_size, _window(processor)
    (tiled_h, tiled_w), (cell_h, cell_w) = plan.tiled_hw, plan.grid_hw
    parts = zip(np.ndindex(plan.tiling), _kept_parts(plan, processor), strict=True)
    for (row, column), (rows, columns) in parts:
        x, y = column * window_w, row * window_h
        extent = x / tiled_w, y / tiled_h, (x + base_w) / tiled_w, (y + base_h) / tiled_h
        used = columns.start / cell_w, rows.start / cell_h, columns.end / cell_w, rows.end / cell_h
        yield extent, used, (rows.end - rows.start) * (columns.end - columns.start)


def _kept_parts(plan: TilingPlan, processor: JinaImageProcessor) -> Iterator[tuple[Kept, Kept]]:
    """The rows and columns kept from each tile, in reading order."""
    rows, columns = plan.tiling
    return product(kept_rows(rows, processor, 0), kept_rows(columns, processor, 1))


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


def _window(processor: JinaImageProcessor) -> tuple[int, int]:
    """Pixels by which one crop advances to the next: (vertical, horizontal)."""
    margin = sum(processor.overlap_margins)
    rows, columns = processor.patches_hw
    return (rows - margin) * processor.patch_size, (columns - margin) * processor.patch_size
