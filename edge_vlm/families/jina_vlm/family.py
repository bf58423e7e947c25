"""jina-vlm for the runtime."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edge_vlm.families.base import Box, Family, Figure, Float32, Int32, Released, UInt8
from edge_vlm.families.jina_vlm import released, tiling
from edge_vlm.families.jina_vlm.cost import vision_work
from edge_vlm.families.jina_vlm.paper import efficiency_table
from edge_vlm.families.jina_vlm.tiling import (
    JinaImageProcessor,
    JinaPrompt,
    JinaTiles,
    JinaTokens,
    TilingPlan,
    patch_order,
    token_block,
)

if TYPE_CHECKING:
    from edge_vlm.families.sizes import Vision, VisionWork


def stitch(
    crop_embeddings: Float32,
    marker_embeddings: Float32,
    plan: TilingPlan,
    settings: JinaImageProcessor,
) -> Float32:
    """Embeddings of a picture's whole token block, in order.

    The markers between the patches are embedded here as well, so that a picture goes into the
    decoder as one batch instead of one small batch for each row of patches.

    Args:
        crop_embeddings: (n_crops, tokens_per_crop, hidden_size), thumbnail first.
        marker_embeddings: (3, hidden_size), rows of <im_start>, <im_col>, <im_end>.
        plan: the picture's tiling.
        settings: the bundle's image processor.

    Returns:
        (n_image_tokens, hidden_size) float32.
    """
    block = token_block(plan, settings)
    hidden = crop_embeddings.shape[-1]
    rows = np.empty((len(block), hidden), np.float32)
    for code, marker in zip("sce", marker_embeddings, strict=True):
        rows[block == code] = marker
    order = patch_order(plan, settings).ravel()
    used = order >= 0
    positions = np.flatnonzero(block == "p")
    rows[positions[order[used]]] = crop_embeddings.reshape(-1, hidden)[used]
    return rows


PHOTO = 12  # times as many pixels as the model takes: 12 megapixels for the released one


class JinaVLM(Family):
    """Overlapping tiles and a thumbnail, SigLIP2, attention pooling, Qwen3."""

    name = "jina-vlm"
    processor = JinaImageProcessor
    tokens = JinaTokens
    prompt = JinaPrompt
    n_markers = 3  # <im_start>, <im_col>, <im_end>
    extras: ClassVar[Mapping[str, type[np.generic]]] = {"is_last": np.bool_}

    def layout(self, width: int, height: int, processor: JinaImageProcessor) -> TilingPlan:
        """See ``tiling.plan_tiling``."""
        return tiling.plan_tiling(height, width, processor)

    def cut(self, pixels: UInt8, processor: JinaImageProcessor) -> JinaTiles:
        """See ``tiling.cut_tiles``."""
        return tiling.cut_tiles(pixels, processor)

    def rows(
        self,
        embeddings: Float32,
        markers: Float32,
        plan: TilingPlan,
        processor: JinaImageProcessor,
    ) -> Float32:
        """See ``stitch``."""
        return stitch(embeddings, markers, plan, processor)

    def block(self, plan: TilingPlan, processor: JinaImageProcessor, tokens: JinaTokens) -> Int32:
        """See ``tiling.token_block``."""
        ids = {"s": tokens.im_start, "p": tokens.im_patch, "c": tokens.im_col, "e": tokens.im_end}
        return np.array([ids[code] for code in tiling.token_block(plan, processor)], np.int32)

    def limited(self, processor: JinaImageProcessor, max_tiles: int) -> JinaImageProcessor:
        """At most so many crops besides the thumbnail."""
        return processor.model_copy(update={"max_crops": max_tiles})

    def largest(self, processor: JinaImageProcessor) -> Sequence[tuple[int, int]]:
        """The photo of many shapes that has the most tokens."""
        area = PHOTO * processor.max_pixels
        ratios = [a / b for a in range(1, processor.max_tiles + 1) for b in (1, 2, 3, 4, 6, 12)]
        shapes = [(round(math.sqrt(area * r)), round(math.sqrt(area / r))) for r in ratios]
        return [max(shapes, key=lambda size: self.layout(size[0], size[1], processor).n_tokens)]

    def boxes(
        self, plan: TilingPlan, processor: JinaImageProcessor
    ) -> Iterator[tuple[Box, Box, int]]:
        """See ``tiling.tile_boxes``."""
        return tiling.tile_boxes(plan, processor)

    def work(self, processor: JinaImageProcessor, vision: Vision) -> VisionWork:
        """See ``cost.vision_work``."""
        return vision_work(processor, vision)

    def released(self) -> Mapping[str, Released]:
        """The one that is published."""
        sizes = Released(released.IMAGE_PROCESSOR, released.VISION, released.DECODER)
        return {released.NAME: sizes}

    def published(self) -> Sequence[Figure]:
        """See ``paper``."""
        return efficiency_table()


FAMILY = JinaVLM()
