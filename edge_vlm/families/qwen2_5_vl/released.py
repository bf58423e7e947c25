"""Released Qwen2.5-VL models' settings, for planning without their weights.

Source: config.json and preprocessor_config.json of ``Qwen/Qwen2.5-VL-3B-Instruct`` and
``Qwen/Qwen2.5-VL-7B-Instruct`` on Hugging Face.
"""

from __future__ import annotations

from typing import Any

from edge_vlm.families.base import Released
from edge_vlm.families.qwen2_5_vl.processor import QwenImageProcessor
from edge_vlm.families.sizes import Decoder, Vision

IMAGE_PROCESSOR = QwenImageProcessor(
    patch_size=14,
    merge_size=2,
    window_size=112,
    n_full_layers=4,
    min_pixels=4 * 28**2,
    max_pixels=16384 * 28**2,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)


def _released(**decoder: Any) -> Released:
    """The tower that all sizes have, and one of Qwen2.5's decoders."""
    width = decoder["hidden_size"]
    vision = Vision(
        precision="fp16",
        n_layers=32,
        hidden_size=1280,
        output_size=width,
        n_heads=16,
        ffn_size=3420,
        feature_size=1280,
        projector_size=4 * 1280,
    )
    common = {"precision": "f16", "vocab_size": 151665, "head_dim": 128}
    common |= {"max_sequence_length": 128000}
    return Released(IMAGE_PROCESSOR, vision, Decoder.model_validate({**common, **decoder}))


# The additional ids are rows without a token.
RELEASED = {
    "qwen2.5-vl-3b": _released(
        n_layers=36,
        hidden_size=2048,
        ffn_size=11008,
        n_heads=16,
        n_kv_heads=2,
        additional_vocab_size=271,
        tied_head=True,
    ),
    "qwen2.5-vl-7b": _released(
        n_layers=28,
        hidden_size=3584,
        ffn_size=18944,
        n_heads=28,
        n_kv_heads=4,
        additional_vocab_size=399,
        tied_head=False,
    ),
}
