"""InternVL for the runtime: its own of everything that a family supplies."""

from __future__ import annotations

from edge_vlm.families.base import Family, Prompt, Released
from edge_vlm.families.internvl import tiling
from edge_vlm.families.internvl.processor import InternImageProcessor, InternTokens
from edge_vlm.families.internvl.released import RELEASED
from edge_vlm.families.sizes import Transformer, Vision, VisionWork


class InternVL(Family):
    """Tiles of the nearest aspect ratio and a thumbnail, InternViT, an MLP, a language model."""

    name = "internvl"
    processor = InternImageProcessor
    tokens = InternTokens
    prompt = Prompt
    n_markers = 2  # <img>, </img>

    layout = staticmethod(tiling.plan_picture)
    cut = staticmethod(tiling.cut_tiles)
    rows = staticmethod(tiling.rows_of)
    block = staticmethod(tiling.block_of)
    boxes = staticmethod(tiling.tile_boxes)
    largest = staticmethod(tiling.largest_pictures)

    def limited(self, processor: InternImageProcessor, max_tiles: int) -> InternImageProcessor:
        """At most so many crops besides the thumbnail."""
        most = min(max_tiles, processor.max_crops)
        least = min(most, processor.min_crops)
        return processor.model_copy(update={"max_crops": most, "min_crops": least})

    def work(self, processor: InternImageProcessor, vision: Vision) -> VisionWork:
        """Of the tower and the projector, what one crop costs."""
        tower, (n_patches, patch_values) = Transformer.of(vision), processor.crop_shape
        n_rows = n_patches + 1  # the class token's
        out = vision.output_size
        read = vision.feature_size or processor.shuffle**2 * vision.hidden_size
        projector = (read + out) * (vision.projector_size or out)
        return VisionWork(
            n_weights=tower.n_weights(n_rows, patch_values) + projector,
            tower_flops=tower.flops(n_rows, patch_values),
            connector_flops=2 * processor.tokens_per_crop * projector,
            live_bytes=tower.live_bytes(n_rows),
        )

    def released(self) -> dict[str, Released]:
        """Those small enough for a device."""
        return RELEASED


FAMILY = InternVL()
