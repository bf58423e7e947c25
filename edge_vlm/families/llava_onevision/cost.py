"""What a crop costs in LLaVA-OneVision's vision tower and projector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_vlm.families.sizes import Transformer, Vision, VisionWork

if TYPE_CHECKING:
    from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor


def vision_work(processor: OneVisionImageProcessor, vision: Vision) -> VisionWork:
    """What one crop costs; sizes that a manifest lacks have the proportions of SigLIP-So400M."""
    hidden, out = vision.hidden_size, vision.output_size
    tower = Transformer(
        n_layers=vision.n_layers,
        hidden_size=hidden,
        ffn_size=vision.ffn_size or round(hidden * 4304 / 1152),
        n_heads=vision.n_heads or max(1, hidden // 72),
    )
    n_patches, patch_values = processor.crop_shape
    projector = (hidden + out) * (vision.projector_size or out)
    return VisionWork(
        n_weights=tower.n_weights(n_patches, patch_values) + projector,
        tower_flops=tower.flops(n_patches, patch_values),
        connector_flops=2 * n_patches * projector,
        live_bytes=tower.live_bytes(n_patches),
    )
