"""From a picture to crops: smart resize, choice of a tiling, overlapping crops, token layout.

The arithmetic is the published one, to the last bit: PyTorch's bilinear interpolation
(half-pixel centres, no antialiasing, ``align_corners=False``) in float32 with fused multiply-adds.
It matters because the first resize rounds to whole grey levels, where exact halves are common.
Source: "jina-vlm: Small Multilingual Vision Language Model" (arXiv 2512.04032), section 3, and
the tiling of Molmo (arXiv 2409.17146) that it builds on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from edge_vlm.bundle import ImageProcessor
from edge_vlm.errors import ImageError

MAX_ASPECT_RATIO = 200
NOT_USED = -1

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TilingPlan:
    """What a picture's size alone decides; all sizes are (height, width) in pixels."""

    original_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    tiling: tuple[int, int]  # rows, columns of the crop grid
    tiled_hw: tuple[int, int]
    thumbnail_hw: tuple[int, int]  # rows, columns of vectors kept from the thumbnail
    grid_hw: tuple[int, int]  # the same for all crops together
    is_reduced: bool  # whether a limit makes the model see less than the picture shows

    @property
    def n_crops(self) -> int:
        """Crops to encode, the thumbnail included."""
        return self.tiling[0] * self.tiling[1] + 1

    @property
    def n_patch_tokens(self) -> int:
        """Positions that carry an image vector."""
        return math.prod(self.thumbnail_hw) + math.prod(self.grid_hw)


@dataclass(frozen=True)
class Tiles:
    """The crops of one picture, ready for the vision tower."""

    plan: TilingPlan
    crops: Float32  # (n_crops, n_patches, patch_values) in [-1, 1]; the thumbnail is crop 0

    @cached_property
    def is_last(self) -> npt.NDArray[np.bool_]:
        """(n_crops,): true for the last crop, whose patches all get the partial-padding vector.

        The published code appends the thumbnail's mask at the end while the thumbnail itself goes
        to the front, so the mask meant for it lands on the last crop. The model was trained so.
        """
        last = np.zeros(len(self.crops), np.bool_)
        last[-1] = True
        return last


def plan_tiling(height: int, width: int, settings: ImageProcessor) -> TilingPlan:
    """Decide resize and tiling for a picture of ``height`` x ``width`` pixels.

    Raises:
        ImageError: the longer side is more than 200 times the shorter one.
    """
    resized = smart_resize(height, width, settings)
    rows, columns = choose_tiling(resized, settings)
    window_h, window_w = _window(settings)
    overlap = sum(settings.overlap_margins) * settings.patch_size
    return TilingPlan(
        original_hw=(height, width),
        resized_hw=resized,
        tiling=(rows, columns),
        tiled_hw=(rows * window_h + overlap, columns * window_w + overlap),
        thumbnail_hw=(settings.token_length_h, settings.token_length_w),
        grid_hw=(
            sum(count for _, count in kept_rows(rows, settings, axis=0)),
            sum(count for _, count in kept_rows(columns, settings, axis=1)),
        ),
        # Rounding to whole patches moves a side by at most half a patch.
        is_reduced=any(
            side - used > settings.patch_size / 2
            for side, used in zip((height, width), resized, strict=True)
        ),
    )


def cut_tiles(pixels: UInt8, settings: ImageProcessor) -> Tiles:
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
    return Tiles(plan, crops)


def smart_resize(height: int, width: int, settings: ImageProcessor) -> tuple[int, int]:
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


def choose_tiling(resized_hw: tuple[int, int], settings: ImageProcessor) -> tuple[int, int]:
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


def kept_rows(n_tiles: int, settings: ImageProcessor, axis: int) -> list[tuple[int, int]]:
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


def token_block(plan: TilingPlan, settings: ImageProcessor) -> npt.NDArray[np.str_]:
    """The tokens that stand for the picture, as one-letter codes: thumbnail block, crops block.

    ``s`` <im_start>, ``p`` <im_patch>, ``c`` <im_col>, ``e`` <im_end>; shape (n_image_tokens,).
    """
    text = ""
    for rows, columns in (plan.thumbnail_hw, plan.grid_hw):
        row = "p" * columns + ("c" if settings.use_column_tokens else "")
        text += "s" + row * rows + "e"
    return np.array(list(text))


def n_image_tokens(plan: TilingPlan, settings: ImageProcessor) -> int:
    """Length of ``token_block`` without building it."""
    columns = plan.thumbnail_hw[0] + plan.grid_hw[0] if settings.use_column_tokens else 0
    return plan.n_patch_tokens + columns + 4


def patch_order(plan: TilingPlan, settings: ImageProcessor) -> Int32:
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


def resize_bilinear(pixels: npt.NDArray[np.generic], height: int, width: int) -> Float32:
    """Bilinear resize of (h, w, channels) to float32 (height, width, channels), not rounded."""
    top, bottom, w_top, w_bottom = _axis(pixels.shape[0], height)
    left, right, w_left, w_right = _axis(pixels.shape[1], width)
    # Along x only for the rows that are read: fewer than there are when a picture shrinks a lot.
    rows, position = np.unique(np.concatenate((top, bottom)), return_inverse=True)
    source = pixels[rows]
    across = np.empty((len(rows), width, pixels.shape[2]), np.float32)
    step = max(1, (1 << 20) // max(1, width))  # bounds the float64 temporaries
    for start in range(0, len(rows), step):
        part = source[start : start + step].astype(np.float32)
        across[start : start + step] = _lerp(
            part[:, left], part[:, right], w_left[None, :, None], w_right[None, :, None]
        )
    top, bottom = position[:height], position[height:]
    out = np.empty((height, width, pixels.shape[2]), np.float32)
    for start in range(0, height, step):
        part_rows = slice(start, start + step)
        out[part_rows] = _lerp(
            across[top[part_rows]],
            across[bottom[part_rows]],
            w_top[part_rows, None, None],
            w_bottom[part_rows, None, None],
        )
    return out


def _axis(
    n_in: int, n_out: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Float32, Float32]:
    """Indices of the two neighbours of each output position along one axis, and their weights."""
    scale = np.float32(n_in) / np.float32(n_out)
    centres = np.arange(n_out, dtype=np.float32) + np.float32(0.5)
    # One rounding, as a fused multiply-add has: float64 holds the product exactly.
    position = (centres.astype(np.float64) * np.float64(scale) - 0.5).astype(np.float32)
    position = np.maximum(position, np.float32(0))
    first = np.minimum(position.astype(np.intp), n_in - 1)
    second = np.minimum(first + 1, n_in - 1)
    w_second = np.clip(position - first.astype(np.float32), 0, 1).astype(np.float32)
    return first, second, np.float32(1) - w_second, w_second


def _lerp(first: Float32, second: Float32, w_first: Float32, w_second: Float32) -> Float32:
    """fma(first, w_first, second * w_second) with the two roundings of float32."""
    out = np.multiply(first, w_first, dtype=np.float64)
    out += second * w_second
    result: Float32 = out.astype(np.float32)
    return result


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


def _window(settings: ImageProcessor) -> tuple[int, int]:
    """Pixels by which one crop advances to the next: (vertical, horizontal)."""
    margin = sum(settings.overlap_margins)
    rows, columns = settings.patches_hw
    return (rows - margin) * settings.patch_size, (columns - margin) * settings.patch_size
