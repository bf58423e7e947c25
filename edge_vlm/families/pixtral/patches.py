"""From a picture to patches and to the rows of its token block.

Sources: "Pixtral 12B" (arXiv 2410.07073), section 2, and the image processor and the processor in
transformers (models/pixtral), whose arithmetic this is. Mistral's own code rounds a side that
becomes smaller, transformers takes the whole number below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import ImageError
from edge_vlm.families.base import Float32, Layout, Tiles, UInt8
from edge_vlm.families.resample import is_reduced, resize_bicubic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edge_vlm.families.pixtral.processor import PixtralImageProcessor

Int64 = npt.NDArray[np.int64]
Size = tuple[int, int]  # height, width, or rows, columns


@dataclass(frozen=True)
class PixtralTiles(Tiles):
    """A picture's patches, and where each of them is."""

    places: Int64  # (1, n_patches, 2): row and column

    @property
    def tokens_per_crop(self) -> int:
        """Vectors of the picture's patches."""
        return self.plan.tile_tokens

    @property
    def extras(self) -> Mapping[str, Int64]:
        """See ``places_of``."""
        return {"places": self.places}


def grid_of(height: int, width: int, processor: PixtralImageProcessor) -> Size:
    """Rows and columns of patches; 0 of a side of which less than a pixel is left."""
    patch, most = processor.patch_size, processor.max_patches
    shrink = max(height / processor.longest_edge, width / processor.longest_edge)
    sides = (height, width)
    if shrink > 1:
        sides = math.floor(height / shrink), math.floor(width / shrink)
    rows, columns = (-(-side // patch) for side in sides)
    if rows * columns <= most:
        return rows, columns
    # Fewer than published: whole patches below the size that has so many.
    shrink = math.sqrt(height * width / most) / patch
    rows, columns = (max(1, math.floor(side / shrink / patch)) for side in (height, width))
    rows = min(rows, most, processor.side_patches)
    return rows, min(columns, most // rows, processor.side_patches)


def plan_picture(width: int, height: int, processor: PixtralImageProcessor) -> Layout:
    """Size and tokens of a picture of ``width`` x ``height`` pixels; ``tiling`` is in patches.

    Raises:
        ImageError: it is so long that nothing is left of the other side.
    """
    rows, columns = grid_of(height, width, processor)
    if not rows * columns:
        raise ImageError(
            f"the picture is {width}x{height} pixels: made {processor.longest_edge} pixels long,"
            " it would be less than a pixel thick; crop it first"
        )
    resized = rows * processor.patch_size, columns * processor.patch_size
    return Layout(
        original_hw=(height, width),
        resized_hw=resized,
        tiling=(rows, columns),
        is_reduced=is_reduced((height, width), resized, processor.patch_size),
        n_crops=1,
        n_tokens=rows * (columns + 1),
        overview_tokens=0,
        tile_tokens=rows * columns,
    )


@cache
def largest_pictures(processor: PixtralImageProcessor) -> tuple[Size, ...]:
    """(width, height) of the picture with the most tokens, and of one with the most patches."""
    side, most = processor.side_patches, processor.max_patches
    grids = [(min(side, most // columns), columns) for columns in range(1, min(side, most) + 1)]
    tokens = max(grids, key=lambda grid: grid[0] * (grid[1] + 1))
    patches = max(grids, key=math.prod)
    edge = processor.longest_edge
    sizes = [
        (min(edge, columns * processor.patch_size), min(edge, rows * processor.patch_size))
        for rows, columns in dict.fromkeys((tokens, patches))
    ]
    return tuple(sizes)


def cut_patches(pixels: UInt8, processor: PixtralImageProcessor) -> PixtralTiles:
    """A picture (height, width, 3) as one crop: patches in reading order, as (channel, y, x).

    Raises:
        ImageError: see ``plan_picture``.
    """
    plan = plan_picture(pixels.shape[1], pixels.shape[0], processor)
    levels = resize_bicubic(pixels, *plan.resized_hw)
    (rows, columns), patch = plan.tiling, processor.patch_size
    crop = np.empty((1, rows * columns, 3 * patch**2), np.float32)
    values = crop.reshape(rows, columns, 3, patch, patch)
    for channel, table in enumerate(normalised_levels(processor)):
        grid = table[levels[..., channel]].reshape(rows, patch, columns, patch)
        values[:, :, channel] = grid.swapaxes(1, 2)
    return PixtralTiles(plan, crop, places_of(plan.tiling))


def normalised_levels(processor: PixtralImageProcessor) -> Float32:
    """(3, 256): what becomes of each 8-bit level of a channel."""
    levels = (np.arange(256) / 255).astype(np.float32)
    mean = np.array(processor.image_mean, np.float32)[:, None]
    std = np.array(processor.image_std, np.float32)[:, None]
    normalised: Float32 = (levels - mean) / std
    return normalised


def places_of(tiling: Size) -> Int64:
    """(1, n_patches, 2): row and column of each patch in reading order."""
    return np.stack([axis.ravel() for axis in np.indices(tiling, np.int64)], axis=-1)[None]


def lines(vectors: Float32, ends: Float32, plan: Layout) -> Float32:
    """(n_tokens, hidden_size): the patches' vectors, a break behind each row, at last an end.

    ``ends`` are break and end, (2, hidden_size).
    """
    rows, columns = plan.tiling
    block = np.empty((rows, columns + 1, vectors.shape[1]), np.float32)
    block[:, :columns] = vectors.reshape(rows, columns, -1)
    block[:, columns] = ends[0]
    block[-1, columns] = ends[1]
    return block.reshape(plan.n_tokens, -1)
