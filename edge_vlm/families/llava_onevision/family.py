"""LLaVA-OneVision for the runtime: its own of everything that a family supplies."""

from __future__ import annotations

from edge_vlm.families import llava_like
from edge_vlm.families.base import Family, Prompt, Released, Tokens
from edge_vlm.families.llava_onevision import tiling
from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor
from edge_vlm.families.llava_onevision.released import RELEASED


class LlavaOneVision(Family):
    """Tiles that do not overlap and an overview, SigLIP, an MLP, Qwen2."""

    name = "llava-onevision"
    processor = OneVisionImageProcessor
    tokens = Tokens
    prompt = Prompt
    n_markers = 1  # the vector behind each row

    layout = staticmethod(tiling.plan_picture)
    cut = staticmethod(tiling.cut_tiles)
    rows = staticmethod(tiling.pack)
    boxes = staticmethod(llava_like.grid_boxes)
    largest = staticmethod(tiling.largest_pictures)
    limited = staticmethod(llava_like.fewer_grids)
    block = staticmethod(llava_like.as_image_tokens)
    work = staticmethod(llava_like.vision_work)

    def beside(
        self, processor: OneVisionImageProcessor, n_pictures: int
    ) -> OneVisionImageProcessor:
        """One of several pictures is a single crop."""
        return processor.model_copy(update={"tiled": n_pictures < 2})

    def released(self) -> dict[str, Released]:
        """Two sizes of the models that take one picture, several, or film."""
        return RELEASED


FAMILY = LlavaOneVision()
