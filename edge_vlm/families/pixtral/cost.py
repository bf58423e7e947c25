"""What a picture costs in Pixtral's tower and projector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_vlm.families.sizes import Transformer, Vision, VisionWork

if TYPE_CHECKING:
    from edge_vlm.families.base import Layout
    from edge_vlm.families.pixtral.processor import PixtralImageProcessor


def picture_work(plan: Layout, processor: PixtralImageProcessor, vision: Vision) -> VisionWork:
    """Of its one crop. No scores of all patches with all are held."""
    tower, n_patches = Transformer.of(vision), plan.tile_tokens
    hidden, out = tower.hidden_size, vision.output_size
    block = hidden * (4 * hidden + 3 * tower.ffn_size)
    embedding = hidden * processor.crop_shape[1]
    projector = (hidden + out) * (vision.projector_size or out)
    blocks = tower.n_layers * (2 * block + 4 * n_patches * hidden)
    values, widened = 4 * n_patches * hidden, 4 * n_patches * tower.ffn_size
    return VisionWork(
        n_weights=tower.n_layers * block + embedding + projector,
        tower_flops=n_patches * (2 * embedding + blocks),
        connector_flops=2 * n_patches * projector,
        # The residual, and either queries, keys, values before and after they turn or the
        # feed-forward part.
        live_bytes=values + max(6 * values, values + 3 * widened),
    )
