"""LLaVA-NeXT for the runtime: its own of everything that a family supplies."""

from __future__ import annotations

from edge_vlm.families import llava_like
from edge_vlm.families.base import Family, Released, SentencePiecePrompt, Tokens
from edge_vlm.families.llava import tiles
from edge_vlm.families.llava.released import NEXT_RELEASED


class LlavaNext(Family):
    """Tiles that do not overlap and an overview, CLIP, an MLP, Mistral or Llama."""

    name = "llava-next"
    processor = tiles.LlavaNextImageProcessor
    tokens = Tokens
    prompt = SentencePiecePrompt
    n_markers = 1  # the vector behind each row

    layout = staticmethod(tiles.plan_picture)
    cut = staticmethod(tiles.cut_tiles)
    rows = staticmethod(llava_like.pack_grid)
    block = staticmethod(llava_like.as_image_tokens)
    limited = staticmethod(llava_like.fewer_grids)
    largest = staticmethod(tiles.largest_pictures)
    boxes = staticmethod(llava_like.grid_boxes)
    work = staticmethod(llava_like.clip_work)

    def released(self) -> dict[str, Released]:
        """With the decoders of Mistral and Vicuna."""
        return NEXT_RELEASED


FAMILY = LlavaNext()
