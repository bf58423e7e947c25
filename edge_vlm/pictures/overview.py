"""A picture of what the model sees: the tiles over the picture, the thumbnail beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_vlm.families.base import family_of

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from edge_vlm.families.base import Box, ImageProcessor, Layout

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_LONG_SIDE = 1200  # pixels of the drawn picture
_THUMBNAIL_SIDE = 320
_GAP = 24
_INK, _PAPER, _LINE, _SHADE = (20, 20, 20), (255, 255, 255), (230, 40, 60), (30, 90, 230)


def draw_tiling(pixels: npt.NDArray[np.uint8], settings: ImageProcessor) -> Image.Image:
    """Draw how a picture of shape (height, width, 3) is cut.

    Lines bound the part of each tile whose vectors the decoder gets; where neighbouring tiles
    overlap, the picture is shaded. Each part is labelled with its number of image tokens.

    Raises:
        ImageError: the picture cannot be tiled.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = pixels.shape[:2]
    family = family_of(settings)
    plan = family.layout(width, height, settings)
    size = _scaled(height, width, _LONG_SIDE)
    source = Image.fromarray(pixels)
    picture = source.resize(size, Image.Resampling.LANCZOS).convert("RGBA")

    shade = np.zeros((size[1], size[0]), np.uint8)
    boxes = list(family.boxes(plan, settings))
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
        corner = (max(left, right - 1), max(top, bottom - 1))  # of a strip, less than a pixel
        draw.rectangle((left, top, *corner), outline=_LINE, width=2)
        _tag(draw, (left + 5, top + 5), f"{number}: {count} tokens", font)

    small = _scaled(*settings.tile_hw, _THUMBNAIL_SIDE)
    thumbnail = source.resize(small, Image.Resampling.LANCZOS)
    lines = _legend(plan, settings)
    text_width = max(int(draw.textlength(line, font=font)) for line in lines)
    sheet_size = (
        max(size[0] + _GAP + thumbnail.width, text_width) + 2 * _GAP,
        max(size[1], thumbnail.height) + 24 * len(lines) + 3 * _GAP,
    )
    sheet = Image.new("RGB", sheet_size, _PAPER)
    sheet.paste(picture, (_GAP, _GAP))
    beside = (size[0] + 2 * _GAP, _GAP)
    draw = ImageDraw.Draw(sheet)
    if plan.overview_tokens:
        sheet.paste(thumbnail, beside)
        corner = (beside[0] + thumbnail.width - 1, beside[1] + thumbnail.height - 1)
        draw.rectangle((*beside, *corner), outline=_LINE, width=2)
        label = f"thumbnail: {plan.overview_tokens} tokens"
        _tag(draw, (beside[0] + 5, beside[1] + 5), label, font)
    for index, line in enumerate(lines):
        y = sheet_size[1] - _GAP - 24 * (len(lines) - index)
        draw.text((_GAP, y), line, fill=_INK, font=font)
    return sheet


def _legend(plan: Layout, settings: ImageProcessor) -> list[str]:
    (height, width), (used_h, used_w) = plan.original_hw, plan.resized_hw
    rows, columns = plan.tiling
    base_h, base_w = settings.tile_hw
    n_patch_tokens = plan.overview_tokens + plan.tile_tokens
    n_markers = plan.n_tokens - n_patch_tokens
    thumbnail = " and a thumbnail" if plan.overview_tokens else ""
    if settings.any_size:
        return [
            f"{width}x{height} pixels, used at {used_w}x{used_h} as a whole:"
            f" {rows}x{columns} image tokens"
        ]
    return [
        f"{width}x{height} pixels, used at {used_w}x{used_h}: {rows}x{columns} tiles of"
        f" {base_w}x{base_h}{thumbnail}",
        f"{plan.n_tokens} image tokens: {n_patch_tokens} for patches and {n_markers} row ends and"
        " markers; shaded parts are seen by two tiles or more",
    ]


def _scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """(width, height) with a longer side of so many pixels."""
    scale = longest / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    left, top, right, bottom = box
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def _tag(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, font: Font) -> None:
    """Text on a white plate, readable on any picture."""
    left, top, right, bottom = draw.textbbox(at, text, font=font)
    draw.rectangle((left - 3, top - 3, right + 3, bottom + 3), fill=_PAPER)
    draw.text(at, text, fill=_INK, font=font)
