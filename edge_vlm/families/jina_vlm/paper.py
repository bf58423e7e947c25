"""The efficiency table of the model's paper, computed again from the architecture.

Source: "jina-vlm: Small Multilingual Vision Language Model" (arXiv 2512.04032), for a picture of
twelve tiles and the thumbnail. The paper does not say how it counts; these conventions give every
figure as printed:

- tokens: 13 crops x 729 patches, and 13 x 182 (729 / 4) with pooling; no layout tokens;
- prefill: matrix products of the decoder's blocks and of the connector's projector for each token,
  with pooling also those of the attention pooling; the decoder's attention scores and its head are
  not counted;
- total: prefill and all 27 blocks of the vision tower, here with attention scores;
- KV cache: four bytes an element, and 1 GB is 1000 x 1000 x 1024 bytes.
"""

from __future__ import annotations

from dataclasses import replace

from edge_vlm.families.base import Figure
from edge_vlm.families.jina_vlm import released
from edge_vlm.families.jina_vlm.cost import vision_sizes
from edge_vlm.families.jina_vlm.tiling import plan_picture
from edge_vlm.families.sizes import block_weights, decoder_flops

TILES = 12
TOWER_BLOCKS = 27  # the runtime leaves out the last two, which nothing reads
PAPER_GB = 1000 * 1000 * 1024
LARGEST_PICTURE = (2728, 2046)  # width, height: twelve tiles


def efficiency_table() -> list[Figure]:
    """The published table for the released architecture."""
    processor, decoder = released.IMAGE_PROCESSOR, released.DECODER
    sizes = vision_sizes(released.VISION)
    crops, window = TILES + 1, processor.pooling_h * processor.pooling_w
    patches = crops * processor.n_patches
    pooled = crops * (processor.n_patches // window)

    for_pooled, for_patch = sizes.pooling_weights
    per_token = decoder.n_layers * block_weights(decoder) + sizes.projector_weights
    plain_flops = 2 * patches * per_token
    pooled_flops = 2 * pooled * (per_token + for_pooled + window * for_patch)

    whole_tower = replace(sizes, n_layers=TOWER_BLOCKS)
    tower = crops * whole_tower.flops(*processor.crop_shape)
    whole_ratio = (tower + plain_flops) / (tower + pooled_flops)
    kv = decoder.kv_bytes_per_token(4.0)

    tokens = plan_picture(*LARGEST_PICTURE, processor).n_tokens
    used_kv = tokens * decoder.kv_bytes_per_token()
    prefill = decoder_flops(decoder, tokens)
    return [
        Figure("visual tokens, no pooling", "", 9477, patches, None),
        Figure("visual tokens, pooled", "", 2366, pooled, tokens),
        Figure("prefill, no pooling", "TFLOPs", 27.2, plain_flops / 1e12, None),
        Figure("prefill, pooled", "TFLOPs", 6.9, pooled_flops / 1e12, prefill / 1e12),
        Figure("KV cache, no pooling", "GB", 2.12, patches * kv / PAPER_GB, None),
        Figure("KV cache, pooled", "GB", 0.53, pooled * kv / PAPER_GB, used_kv / 1e9),
        Figure("total FLOPs, ratio", "", 2.3, whole_ratio, None),
    ]
