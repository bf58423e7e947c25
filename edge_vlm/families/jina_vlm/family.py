"""jina-vlm for the runtime: its own of everything that a family supplies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from edge_vlm.families.base import Family, Int32, Released
from edge_vlm.families.jina_vlm import cost, paper, tiling
from edge_vlm.families.jina_vlm.released import RELEASED
from edge_vlm.families.jina_vlm.tiling import JinaImageProcessor, JinaTokens, TilingPlan

PHOTO = 12  # times as many pixels as the model takes: 12 megapixels for the released one


class JinaVLM(Family):
    """Overlapping tiles and a thumbnail, SigLIP2, attention pooling, Qwen3."""

    name = "jina-vlm"
    processor = JinaImageProcessor
    tokens = JinaTokens
    prompt = tiling.JinaPrompt
    n_markers = 3  # <im_start>, <im_col>, <im_end>
    extras: ClassVar[Mapping[str, type[np.generic]]] = {"is_last": np.bool_}

    layout = staticmethod(tiling.plan_picture)
    cut = staticmethod(tiling.cut_tiles)
    rows = staticmethod(tiling.stitch)
    boxes = staticmethod(tiling.tile_boxes)
    work = staticmethod(cost.vision_work)
    published = staticmethod(paper.efficiency_table)

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
        return [max(shapes, key=lambda wh: self.layout(wh[0], wh[1], processor).n_tokens)]

    def released(self) -> Mapping[str, Released]:
        """The one that is published."""
        return RELEASED


FAMILY = JinaVLM()
