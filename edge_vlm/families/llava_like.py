"""What the LLaVA families have in common: patches of square crops, and anyres.

Anyres cuts a picture into the tiles of one of several resolutions and puts their vectors together
again as one grid, without what stands for padding and with a newline behind each row.

Sources: LLaVA-1.5 (arXiv 2310.03744), section 3.4; "LLaVA-NeXT" (llava-vl.github.io, 2024-01-30);
LLaVA-OneVision (arXiv 2408.03326); the image processors in transformers, whose arithmetic this is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import numpy as np
from pydantic import Field, model_validator

from edge_vlm.families.base import (
    Box,
    Float32,
    ImageProcessor,
    Layout,
    Tiles,
    UInt8,
)
from edge_vlm.families.parts import Count
from edge_vlm.families.resample import is_reduced, resize_bicubic, resize_bilinear
from edge_vlm.families.sizes import Transformer, Vision, VisionWork

if TYPE_CHECKING:
    from edge_vlm.families.base import Int32, Tokens

TOLERATED = 1.1  # how many times as long as allowed a side of the grid may be
_CHANNELS = 128  # put together at a time: all of 36 tiles would be copied twice

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Grid = tuple[Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]]
Level = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=10)]
Size = tuple[int, int]  # height, width, or rows, columns


class PatchProcessor(ImageProcessor):
    """Square crops of ``tile_size`` pixels, a vector for each patch of them."""

    patch_size: Count
    tile_size: Annotated[int, Field(ge=1, le=4096)]
    image_mean: tuple[Level, Level, Level]
    image_std: tuple[Deviation, Deviation, Deviation]

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

    @model_validator(mode="after")
    def _has_patches(self) -> PatchProcessor:
        if self.patch_size > self.tile_size:
            raise ValueError("patch_size is larger than tile_size")
        return self


class AnyresProcessor(PatchProcessor):
    """``grids`` are the resolutions to choose from, (rows, columns) of tiles, in the checkpoint's
    order, which decides between equals.
    """

    grids: tuple[Grid, ...] = Field(min_length=1, max_length=256)

    @property
    def max_tiles(self) -> int:
        """Most crops besides the overview."""
        return max(rows * columns for rows, columns in self.grids)

    @model_validator(mode="after")
    def _is_bounded(self) -> AnyresProcessor:
        if self.max_tiles * self.tile_size**2 > 1 << 26:
            raise ValueError("grids: the largest has more than 64 megapixels")
        return self


_Anyres = TypeVar("_Anyres", bound=AnyresProcessor)


@dataclass(frozen=True)
class GridLayout(Layout):
    """With the tiles' vectors as one grid: which are kept, and what those are scaled down to."""

    padding_hw: Size  # rows and columns left out in front of the kept ones
    kept_hw: Size
    grid_hw: Size


def plan_grid(
    width: int, height: int, processor: AnyresProcessor, max_cells: float = math.inf
) -> GridLayout:
    """Decide resolution and tokens for a picture of ``width`` x ``height`` pixels.

    A grid of more than ``max_cells`` vectors is to be scaled down to as many.
    """
    side, tile = processor.side, processor.tile_size
    tiling = choose_grid(height, width, processor)
    resized = fit(height, width, (tiling[0] * tile, tiling[1] * tile))
    padding, kept = unpadded(height, width, (tiling[0] * side, tiling[1] * side))
    ratio = math.sqrt(kept[0] * kept[1] / max_cells)
    grid = (int(kept[0] // ratio), int(kept[1] // ratio)) if ratio > TOLERATED else kept
    overview = processor.tokens_per_crop
    return GridLayout(
        original_hw=(height, width),
        resized_hw=resized,
        tiling=tiling,
        is_reduced=is_reduced((height, width), resized, processor.patch_size),
        n_crops=1 + math.prod(tiling),
        n_tokens=overview + grid[0] * (grid[1] + 1),
        overview_tokens=overview,
        tile_tokens=math.prod(grid),
        padding_hw=padding,
        kept_hw=kept,
        grid_hw=grid,
    )


def choose_grid(height: int, width: int, processor: AnyresProcessor) -> Size:
    """(rows, columns) of tiles: most of the picture's pixels, then the least padding."""

    def fitness(grid: Size) -> tuple[int, int]:
        full_h, full_w = grid[0] * processor.tile_size, grid[1] * processor.tile_size
        scale = min(full_w / width, full_h / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - full_h * full_w

    return max(processor.grids, key=fitness)  # the first of equal ones


def fit(height: int, width: int, full: Size) -> Size:
    """The size at which a picture fills a canvas of ``full`` pixels in one direction."""
    full_h, full_w = full
    scale_h, scale_w = full_h / height, full_w / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), full_h), full_w
    return full_h, min(math.ceil(width * scale_h), full_w)


def unpadded(height: int, width: int, grid: Size) -> tuple[Size, Size]:
    """Of a grid of vectors, (rows, columns) that hold padding in front, and that are kept.

    As many are left out on either side, so one of padding may stay.
    """
    rows, columns = grid
    if width / height > columns / rows:
        above = (rows - int(round(height * (columns / width), 7))) // 2
        return (above, 0), (rows - 2 * above, columns)
    before = (columns - int(round(width * (rows / height), 7))) // 2
    return (0, before), (rows, columns - 2 * before)


def fewer_grids(processor: _Anyres, max_tiles: int) -> _Anyres:
    """Only resolutions of at most so many tiles, or the smallest there are."""
    most = max(max_tiles, min(map(math.prod, processor.grids)))
    grids = tuple(grid for grid in processor.grids if math.prod(grid) <= most)
    return processor.model_copy(update={"grids": grids})


def cut_grid(pixels: UInt8, plan: GridLayout, processor: AnyresProcessor) -> UInt8:
    """The crops of a picture (height, width, 3): (n_crops, tile_size, tile_size, 3).

    The overview is the first, as large as a tile whatever the picture's shape.
    """
    tile = processor.tile_size
    (rows, columns), (height, width) = plan.tiling, plan.resized_hw
    canvas = np.zeros((rows * tile, columns * tile, 3), np.uint8)  # padding is black
    top, left = (rows * tile - height) // 2, (columns * tile - width) // 2
    canvas[top : top + height, left : left + width] = resize_bicubic(pixels, height, width)
    tiles = canvas.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    overview = resize_bicubic(pixels, tile, tile)
    return np.concatenate((overview[None], tiles.reshape(-1, tile, tile, 3)))


def tiles_of(levels: UInt8, plan: Layout, processor: PatchProcessor) -> Tiles:
    """Crops of 8-bit levels (n_crops, tile_size, tile_size, 3) as normalised patches."""
    crops = np.empty((len(levels), *processor.crop_shape), np.float32)
    unit = (np.arange(256) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(v, np.float32) for v in (processor.image_mean, processor.image_std))
    tables: Float32 = (unit - mean[:, None]) / std[:, None]  # (3, 256)
    patch, side = processor.patch_size, processor.side
    seen = side * patch  # the convolution has no padding: what is left of a patch it does not see
    for crop, level in zip(crops, levels, strict=True):
        values = crop.reshape(side, side, 3, patch, patch)
        for channel, table in enumerate(tables):
            patches = table[level[:seen, :seen, channel]].reshape(side, patch, side, patch)
            values[:, :, channel] = patches.swapaxes(1, 2)
    return Tiles(plan, crops)


def pack_grid(
    embeddings: Float32, markers: Float32, plan: GridLayout, processor: AnyresProcessor
) -> Float32:
    """The overview's vectors, then the tiles' as one grid without padding, a newline behind a row.

    Args:
        embeddings: (n_crops, tokens_per_crop, hidden_size), the overview first.
        markers: (1, hidden_size).
        plan: the picture's layout.
        processor: what it was planned with.

    Returns:
        (n_tokens, hidden_size) float32.
    """
    hidden = embeddings.shape[-1]
    out = np.empty((plan.n_tokens, hidden), np.float32)
    out[: plan.overview_tokens] = embeddings[0]
    rows, columns = plan.grid_hw
    lines = out[plan.overview_tokens :].reshape(rows, columns + 1, hidden)
    lines[:, columns] = markers
    tiles = embeddings[1:].reshape(*plan.tiling, processor.side, processor.side, hidden)
    (top, left), (n_rows, n_columns) = plan.padding_hw, plan.kept_hw
    for start in range(0, hidden, _CHANNELS):
        part = slice(start, start + _CHANNELS)
        grid = tiles[..., part].swapaxes(1, 2)
        grid = grid.reshape(*(n * processor.side for n in plan.tiling), -1)
        grid = grid[top : top + n_rows, left : left + n_columns]
        if plan.grid_hw != plan.kept_hw:
            grid = resize_bilinear(grid, rows, columns)
        lines[:, :columns, part] = grid
    return out


def grid_boxes(plan: GridLayout, processor: AnyresProcessor) -> Iterator[tuple[Box, Box, int]]:
    """Each tile that holds a part of the picture: its extent, which is also the part used, and
    its vectors; where those are scaled down, how many have their centre in it.
    """
    spans = [_spans(plan, processor, axis) for axis in (0, 1)]
    for top, bottom, n_rows in spans[0]:
        for left, right, n_columns in spans[1]:
            box = (left, top, right, bottom)
            yield box, box, n_rows * n_columns


def _spans(
    plan: GridLayout, processor: AnyresProcessor, axis: int
) -> list[tuple[float, float, int]]:
    """Along one axis: where each tile begins and ends in parts of the picture, its vectors."""
    kept, used, padding = plan.kept_hw[axis], plan.grid_hw[axis], plan.padding_hw[axis]
    centres = (np.arange(used) + 0.5) * (kept / max(1, used))
    spans = []
    for tile in range(plan.tiling[axis]):
        start = max(0, tile * processor.side - padding)
        stop = min(kept, (tile + 1) * processor.side - padding)
        if start < stop:
            count = int(((start <= centres) & (centres < stop)).sum())
            spans.append((start / kept, stop / kept, count))
    return spans


def as_image_tokens(plan: Layout, processor: PatchProcessor, tokens: Tokens) -> Int32:
    """A picture's block of ids: as many <image> as there are vectors."""
    del processor
    return np.full(plan.n_tokens, tokens.image, np.int32)


def vision_work(processor: PatchProcessor, vision: Vision, n_class: int = 0) -> VisionWork:
    """Of a tower with ``n_class`` class tokens and a projector of two products, for one crop."""
    tower, (n_patches, patch_values) = Transformer.of(vision), processor.crop_shape
    out, n_rows = vision.output_size, n_patches + n_class
    projector = (vision.hidden_size + out) * (vision.projector_size or out)
    return VisionWork(
        n_weights=tower.n_weights(n_rows, patch_values) + projector,
        tower_flops=tower.flops(n_rows, patch_values),
        connector_flops=2 * n_patches * projector,
        live_bytes=tower.live_bytes(n_rows),
    )


def clip_work(processor: PatchProcessor, vision: Vision) -> VisionWork:
    """The same of CLIP, which has one class token."""
    return vision_work(processor, vision, n_class=1)
