"""What a picture costs in Qwen2.5-VL's tower and merger."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edge_vlm.families.sizes import Transformer, Vision, VisionWork

if TYPE_CHECKING:
    from edge_vlm.families.base import Layout
    from edge_vlm.families.qwen2_5_vl.processor import QwenImageProcessor


def picture_work(plan: Layout, processor: QwenImageProcessor, vision: Vision) -> VisionWork:
    """Of its one crop; padding of the windows at the picture's edges included."""
    tower, window = Transformer.of(vision), processor.window_blocks
    hidden, n_full = tower.hidden_size, min(processor.n_full_layers, tower.n_layers)
    n_patches = plan.n_tokens * processor.block_patches
    in_window = window**2 * processor.block_patches
    n_windows = math.prod(-(-blocks // window) for blocks in plan.tiling)
    block = hidden * (4 * hidden + 3 * tower.ffn_size)
    merged = hidden * processor.block_patches
    merger = merged * (merged + vision.output_size)
    embedding = hidden * processor.crop_shape[1]
    pairs = n_full * n_patches**2 + (tower.n_layers - n_full) * n_windows * in_window**2
    values, padded = 4 * n_patches * hidden, 4 * n_windows * in_window * hidden
    scores = 4 * n_windows * in_window**2 * tower.n_heads
    return VisionWork(
        n_weights=tower.n_layers * block + embedding + merger,
        tower_flops=2 * n_patches * (embedding + tower.n_layers * block) + 4 * pairs * hidden,
        connector_flops=2 * plan.n_tokens * merger,
        # The residual, and either queries, keys, values and scores, or the feed-forward part with
        # what goes in and comes out; measured: 309 MB grow the arena for 784 x 784 pixels.
        live_bytes=values
        + max(3 * padded + values + 2 * scores, 2 * values + 12 * n_patches * tower.ffn_size),
    )
