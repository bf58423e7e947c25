"""Released LLaVA-OneVision models' settings, for planning without their weights.

Source: config.json and preprocessor_config.json of ``llava-hf/llava-onevision-qwen2-0.5b-ov-hf``
and ``llava-hf/llava-onevision-qwen2-7b-ov-hf`` on Hugging Face.
"""

from __future__ import annotations

from typing import Any

from edge_vlm.families.base import Released
from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor
from edge_vlm.families.sizes import Decoder, Vision

IMAGE_PROCESSOR = OneVisionImageProcessor(
    patch_size=14,
    tile_size=384,
    grids=tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7)),
    max_vectors=9,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)


def _released(**decoder: Any) -> Released:
    """SigLIP-So400M without its last layer, the projector, and one of Qwen2's decoders."""
    width = decoder["hidden_size"]
    vision = Vision(
        precision="fp16",
        n_layers=26,
        hidden_size=1152,
        output_size=width,
        n_heads=16,
        ffn_size=4304,
        feature_size=1152,
        projector_size=width,
    )
    common = {"precision": "f16", "vocab_size": 151646, "max_sequence_length": 32768}
    return Released(IMAGE_PROCESSOR, vision, Decoder.model_validate({**common, **decoder}))


# The additional ids are <image>, <video>, and rows without a token.
RELEASED = {
    "llava-onevision-0.5b": _released(
        n_layers=24,
        hidden_size=896,
        ffn_size=4864,
        n_heads=14,
        n_kv_heads=2,
        head_dim=64,
        additional_vocab_size=354,
        tied_head=True,
    ),
    "llava-onevision-7b": _released(
        n_layers=28,
        hidden_size=3584,
        ffn_size=18944,
        n_heads=28,
        n_kv_heads=4,
        head_dim=128,
        additional_vocab_size=482,
        tied_head=False,
    ),
}
