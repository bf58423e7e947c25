"""LLaVA-1.5 for the runtime: its own of everything that a family supplies."""

from __future__ import annotations

from collections.abc import Iterator

from edge_vlm.families.base import (
    Box,
    Family,
    Float32,
    Layout,
    Released,
    SentencePiecePrompt,
    Tokens,
)
from edge_vlm.families.llava import crop
from edge_vlm.families.llava.crop import Llava15ImageProcessor
from edge_vlm.families.llava.released import RELEASED
from edge_vlm.families.llava_like import Size, as_image_tokens, clip_work


class Llava15(Family):
    """One crop, CLIP, an MLP, Llama."""

    name = "llava-1.5"
    processor = Llava15ImageProcessor
    tokens = Tokens
    prompt = SentencePiecePrompt

    layout = staticmethod(crop.plan_picture)
    cut = staticmethod(crop.cut_crop)
    block = staticmethod(as_image_tokens)
    work = staticmethod(clip_work)

    def rows(
        self, embeddings: Float32, markers: Float32, plan: Layout, processor: Llava15ImageProcessor
    ) -> Float32:
        """The crop's vectors, nothing around them."""
        del markers, plan, processor
        vectors: Float32 = embeddings[0]
        return vectors

    def limited(self, processor: Llava15ImageProcessor, max_tiles: int) -> Llava15ImageProcessor:
        """There is never more than one crop."""
        del max_tiles
        return processor

    def largest(self, processor: Llava15ImageProcessor) -> tuple[Size, ...]:
        """All cost the same."""
        return (processor.tile_hw,)

    def boxes(
        self, plan: Layout, processor: Llava15ImageProcessor
    ) -> Iterator[tuple[Box, Box, int]]:
        """The square in the middle; what is outside of it is not seen."""
        (top, left), (height, width) = crop.corner(plan, processor), plan.resized_hw
        side = processor.tile_size
        box = (left / width, top / height, (left + side) / width, (top + side) / height)
        yield box, box, plan.tile_tokens

    def released(self) -> dict[str, Released]:
        """Both sizes."""
        return RELEASED


FAMILY = Llava15()
