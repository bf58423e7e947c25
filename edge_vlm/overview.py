"""A picture of what the model sees: the tiles over the picture, the thumbnail beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_vlm.bundle import ImageProcessor
from edge_vlm.tiling import TilingPlan, kept_rows, n_image_tokens, plan_tiling

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_LONG_SIDE = 1200  # pixels of the drawn picture
_THUMBNAIL_SIDE = 320
_GAP = 24
_INK, _PAPER, _LINE, _SHADE = (20, 20, 20), (255, 255, 255), (230, 40, 60), (30, 90, 230)

Box = tuple[float, float, float, float]  # left, top, right, bottom; parts of the picture's sides


def tile_boxes(plan: TilingPlan, settings: ImageProcessor) -> Iterator[tuple[Box, Box, int]]:
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


def draw_tiling(pixels: npt.NDArray[np.uint8], settings: ImageProcessor) -> Image.Image:
    """Draw how a picture of shape (height, width, 3) is cut.

    Lines bound the part of each tile whose vectors the decoder gets; where neighbouring tiles
    overlap, the picture is shaded. Each part is labelled with its number of image tokens.

    Raises:
        ImageError: the picture cannot be tiled.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = pixels.shape[:2]
    plan = plan_tiling(height, width, settings)
    scale = _LONG_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    source = Image.fromarray(pixels)
    picture = source.resize(size, Image.Resampling.LANCZOS).convert("RGBA")

    shade = np.zeros((size[1], size[0]), np.uint8)
    boxes = list(tile_boxes(plan, settings))
    for extent, _, _ in boxes:
        left, top, right, bottom = _pixels(extent, size)
        shade[top:bottom, left:right] += 1
    overlay = np.zeros((size[1], size[0], 4), np.uint8)
    overlay[..., :3] = _SHADE
    overlay[..., 3] = np.where(shade > 1, 60, 0)
    picture = Image.alpha_composite(picture, Image.fromarray(overlay)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(16)
    for number, (_, used, count) in enumerate(boxes, 1):
        left, top, right, bottom = _pixels(used, size)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_LINE, width=2)
        _tag(draw, (left + 5, top + 5), f"{number}: {count} tokens", font)

    base_h, base_w = settings.base_input_size
    scale = _THUMBNAIL_SIDE / max(base_h, base_w)
    thumbnail = source.resize(
        (max(1, round(base_w * scale)), max(1, round(base_h * scale))), Image.Resampling.LANCZOS
    )
    lines = _legend(plan, settings)
    text_width = max(int(draw.textlength(line, font=font)) for line in lines)
    sheet_size = (
        max(size[0] + _GAP + thumbnail.width, text_width) + 2 * _GAP,
        max(size[1], thumbnail.height) + 24 * len(lines) + 3 * _GAP,
    )
    sheet = Image.new("RGB", sheet_size, _PAPER)
    sheet.paste(picture, (_GAP, _GAP))
    beside = (size[0] + 2 * _GAP, _GAP)
    sheet.paste(thumbnail, beside)
    draw = ImageDraw.Draw(sheet)
    corner = (beside[0] + thumbnail.width - 1, beside[1] + thumbnail.height - 1)
    draw.rectangle((*beside, *corner), outline=_LINE, width=2)
    n_thumbnail = plan.thumbnail_hw[0] * plan.thumbnail_hw[1]
    _tag(draw, (beside[0] + 5, beside[1] + 5), f"thumbnail: {n_thumbnail} tokens", font)
    for index, line in enumerate(lines):
        y = sheet_size[1] - _GAP - 24 * (len(lines) - index)
        draw.text((_GAP, y), line, fill=_INK, font=font)
    return sheet


def _legend(plan: TilingPlan, settings: ImageProcessor) -> list[str]:
    (height, width), (used_h, used_w) = plan.original_hw, plan.resized_hw
    rows, columns = plan.tiling
    base_h, base_w = settings.base_input_size
    tokens = n_image_tokens(plan, settings)
    n_markers = tokens - plan.n_patch_tokens
    return [
        f"{width}x{height} pixels, used at {used_w}x{used_h}: {rows}x{columns} tiles of"
        f" {base_w}x{base_h} and a thumbnail",
        f"{tokens} image tokens: {plan.n_patch_tokens} for patches and {n_markers} row ends and"
        " markers; shaded parts are seen by two tiles or more",
    ]


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    left, top, right, bottom = box
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def _tag(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, font: Font) -> None:
    """Text on a white plate, readable on any picture."""
    left, top, right, bottom = draw.textbbox(at, text, font=font)
    draw.rectangle((left - 3, top - 3, right + 3, bottom + 3), fill=_PAPER)
    draw.text(at, text, fill=_INK, font=font)
