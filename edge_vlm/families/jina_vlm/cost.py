"""What a crop costs in jina-vlm's vision tower and attention-pooling connector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_vlm.families.sizes import Transformer, Vision, VisionWork

if TYPE_CHECKING:
    from edge_vlm.families.jina_vlm.tiling import JinaImageProcessor


@dataclass(frozen=True)
class VisionSizes(Transformer):
    """Widths of the vision tower and connector."""

    feature_size: int
    projector_size: int
    output_size: int

    @property
    def pooling_weights(self) -> tuple[int, int]:
        """Elements that each pooled vector meets, and that each of the patches under it meets."""
        hidden = self.hidden_size
        return hidden * (self.feature_size + hidden), 2 * hidden * self.feature_size

    @property
    def projector_weights(self) -> int:
        """Elements of the gated projector's matrices."""
        return self.projector_size * (2 * self.hidden_size + self.output_size)


def vision_sizes(vision: Vision) -> VisionSizes:
    """A manifest's; those that an early one lacks follow from the others."""
    return VisionSizes.of(
        vision,
        feature_size=vision.feature_size or 2 * vision.hidden_size,
        projector_size=vision.projector_size or 3 * vision.output_size,
        output_size=vision.output_size,
    )


def vision_work(processor: JinaImageProcessor, vision: Vision) -> VisionWork:
    """What one crop costs."""
    sizes, (n_patches, patch_values) = vision_sizes(vision), processor.crop_shape
    for_pooled, for_patch = sizes.pooling_weights
    window = processor.pooling_h * processor.pooling_w
    per_vector = for_pooled + window * for_patch + sizes.projector_weights
    return VisionWork(
        n_weights=sizes.n_weights(n_patches, patch_values)
        + sum(sizes.pooling_weights)
        + sizes.projector_weights,
        tower_flops=sizes.flops(n_patches, patch_values),
        connector_flops=2 * processor.tokens_per_crop * per_vector,
        live_bytes=sizes.live_bytes(n_patches),
    )
