"""LLaVA-OneVision for the runtime: its own of everything that a family supplies."""

from __future__ import annotations

import math

import numpy as np

from edge_vlm.families.base import Family, Int32, Prompt, Released, Tokens
from edge_vlm.families.llava_onevision import packing, tiling
from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor
from edge_vlm.families.llava_onevision.released import RELEASED
from edge_vlm.families.sizes import Transformer, Vision, VisionWork


class LlavaOneVision(Family):
    """Tiles that do not overlap and an overview, SigLIP, an MLP, Qwen2."""

    name = "llava-onevision"
    processor = OneVisionImageProcessor
    tokens = Tokens
    prompt = Prompt
    n_markers = 1  # the vector behind each row

    layout = staticmethod(tiling.plan_picture)
    cut = staticmethod(tiling.cut_tiles)
    rows = staticmethod(packing.pack)
    boxes = staticmethod(packing.tile_boxes)
    largest = staticmethod(tiling.largest_pictures)

    def block(
        self, plan: tiling.OneVisionLayout, processor: OneVisionImageProcessor, tokens: Tokens
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

    def work(self, processor: OneVisionImageProcessor, vision: Vision) -> VisionWork:
        """Of the tower and the projector, what one crop costs."""
        tower, (n_patches, patch_values) = Transformer.of(vision), processor.crop_shape
        out = vision.output_size
        projector = (vision.hidden_size + out) * (vision.projector_size or out)
        return VisionWork(
            n_weights=tower.n_weights(n_patches, patch_values) + projector,
            tower_flops=tower.flops(n_patches, patch_values),
            connector_flops=2 * n_patches * projector,
            live_bytes=tower.live_bytes(n_patches),
        )

    def released(self) -> dict[str, Released]:
        """Two sizes of the models that take one picture, several, or film."""
        return RELEASED


FAMILY = LlavaOneVision()
