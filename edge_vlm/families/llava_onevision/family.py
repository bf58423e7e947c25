"""LLaVA-OneVision for the runtime."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.families.base import (
    Box,
    Family,
    Float32,
    Int32,
    Prompt,
    Released,
    Tiles,
    Tokens,
    UInt8,
)
from edge_vlm.families.llava_onevision import packing, tiling
from edge_vlm.families.llava_onevision.cost import vision_work
from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor
from edge_vlm.families.llava_onevision.released import RELEASED

if TYPE_CHECKING:
    from edge_vlm.families.llava_onevision.tiling import OneVisionLayout
    from edge_vlm.families.sizes import Vision, VisionWork


class LlavaOneVision(Family):
    """Tiles that do not overlap and an overview, SigLIP, an MLP, Qwen2."""

    name = "llava-onevision"
    processor = OneVisionImageProcessor
    tokens = Tokens
    prompt = Prompt
    n_markers = 1  # the vector behind each row

    def layout(
        self, width: int, height: int, processor: OneVisionImageProcessor
    ) -> OneVisionLayout:
        """See ``tiling.plan_tiling`` and ``check_sides``."""
        tiling.check_sides(height, width)
        return tiling.plan_tiling(height, width, processor)

    def cut(self, pixels: UInt8, processor: OneVisionImageProcessor) -> Tiles:
        """See ``tiling.cut_tiles`` and ``check_sides``."""
        tiling.check_sides(pixels.shape[0], pixels.shape[1])
        return tiling.cut_tiles(pixels, processor)

    def rows(
        self,
        embeddings: Float32,
        markers: Float32,
        plan: OneVisionLayout,
        processor: OneVisionImageProcessor,
    ) -> Float32:
        """See ``packing.pack``."""
        return packing.pack(embeddings, markers, plan, processor)

    def block(
        self, plan: OneVisionLayout, processor: OneVisionImageProcessor, tokens: Tokens
    ) -> Int32:
        """As many <image> as there are vectors."""
        return np.full(plan.n_tokens, tokens.image, np.int32)

    def limited(
        self, processor: OneVisionImageProcessor, max_tiles: int
    ) -> OneVisionImageProcessor:
        """Only resolutions of at most so many tiles, or the smallest there are."""
        least = min(math.prod(grid) for grid in processor.grids)
        most = max(max_tiles, least)
        grids = tuple(grid for grid in processor.grids if math.prod(grid) <= most)
        return processor.model_copy(update={"grids": grids})

    def beside(
        self, processor: OneVisionImageProcessor, n_pictures: int
    ) -> OneVisionImageProcessor:
        """One of several pictures is a single crop."""
        return processor.model_copy(update={"tiled": n_pictures < 2})

    def largest(self, processor: OneVisionImageProcessor) -> Sequence[tuple[int, int]]:
        """See ``tiling.largest_pictures``."""
        return tiling.largest_pictures(processor)

    def boxes(
        self, plan: OneVisionLayout, processor: OneVisionImageProcessor
    ) -> Iterator[tuple[Box, Box, int]]:
        """See ``packing.tile_boxes``."""
        return packing.tile_boxes(plan, processor)

    def work(self, processor: OneVisionImageProcessor, vision: Vision) -> VisionWork:
        """See ``cost.vision_work``."""
        return vision_work(processor, vision)

    def released(self) -> Mapping[str, Released]:
        """Two sizes of the models that take one picture, several, or film."""
        return RELEASED


FAMILY = LlavaOneVision()
