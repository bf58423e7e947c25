"""Qwen2.5-VL for the runtime: its own of everything that a family supplies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from edge_vlm.families.base import (
    Axes,
    Box,
    Family,
    Float32,
    Int32,
    Layout,
    Prompt,
    Released,
    Tokens,
)
from edge_vlm.families.qwen2_5_vl import patches
from edge_vlm.families.qwen2_5_vl.cost import picture_work
from edge_vlm.families.qwen2_5_vl.processor import QwenImageProcessor
from edge_vlm.families.qwen2_5_vl.released import RELEASED

if TYPE_CHECKING:
    from edge_vlm.families.sizes import Vision, VisionWork


class Qwen25VL(Family):
    """A picture as a whole, of any size; M-RoPE."""

    name = "qwen2.5-vl"
    processor = QwenImageProcessor
    tokens = Tokens
    prompt = Prompt
    extras: ClassVar[dict[str, type[np.generic]]] = {
        "places": np.int64,
        "windows": np.int64,
        "filled": np.bool_,
        "slots": np.int64,
    }
    extra_axes: ClassVar[dict[str, Axes]] = {
        "places": ("n_patches", 2),
        "windows": ("n_windows", "window_patches"),
        "filled": ("n_windows", "window_patches"),
        "slots": ("n_patches",),
    }
    # Angles, RMSNorm, and parts of a picture's windows.
    operators = frozenset({"Cos", "Sin", "Pow", "Shape"})

    layout = staticmethod(patches.plan_picture)
    cut = staticmethod(patches.cut_patches)
    positions = staticmethod(patches.block_positions)
    largest = staticmethod(patches.largest_pictures)
    picture_work = staticmethod(picture_work)

    def rows(
        self, embeddings: Float32, markers: Float32, plan: Layout, processor: QwenImageProcessor
    ) -> Float32:
        """The graph's output as it is."""
        rows: Float32 = embeddings[0]
        return rows

    def block(self, plan: Layout, processor: QwenImageProcessor, tokens: Tokens) -> Int32:
        """As many <|image_pad|> as there are vectors; the template writes what is around them."""
        return np.full(plan.n_tokens, tokens.image, np.int32)

    def limited(self, processor: QwenImageProcessor, max_tiles: int) -> QwenImageProcessor:
        """At most so many tiles' pixels, and never less than the least."""
        most = max(max_tiles * math.prod(processor.tile_hw), processor.min_pixels)
        return processor.model_copy(update={"max_pixels": min(most, processor.max_pixels)})

    def boxes(self, plan: Layout, processor: QwenImageProcessor) -> Iterator[tuple[Box, Box, int]]:
        """The picture itself."""
        whole = (0.0, 0.0, 1.0, 1.0)
        yield whole, whole, plan.n_tokens

    def work(self, processor: QwenImageProcessor, vision: Vision) -> VisionWork:
        """Of a square tile."""
        side = processor.tile_hw[0]
        tile = processor.model_copy(update={"min_pixels": side**2, "max_pixels": side**2})
        return picture_work(patches.plan_picture(side, side, tile), processor, vision)

    def released(self) -> dict[str, Released]:
        """Two sizes."""
        return RELEASED

    def inputs(self, crops: Float32, processor: QwenImageProcessor) -> dict[str, npt.NDArray[Any]]:
        """As of square pictures, or of one row of blocks."""
        n_blocks = crops.shape[1] // processor.block_patches
        side = math.isqrt(n_blocks)
        tiling = (side, side) if side * side == n_blocks else (1, n_blocks)
        arranged = patches.arrangement(tiling, processor)
        copies = {name: np.repeat(value, len(crops), 0) for name, value in arranged.items()}
        return {"crops": crops, **copies}


FAMILY = Qwen25VL()
