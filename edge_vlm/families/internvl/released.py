"""Released InternVL2.5 and InternVL3 models' settings, for planning without their weights.

Source: config.json of ``OpenGVLab/InternVL2_5-1B`` and its siblings on Hugging Face.
"""

from __future__ import annotations

from edge_vlm.families.base import Released
from edge_vlm.families.internvl.processor import InternImageProcessor
from edge_vlm.families.sizes import Decoder, Vision

IMAGE_PROCESSOR = InternImageProcessor(
    patch_size=14,
    tile_size=448,
    min_crops=1,
    max_crops=12,
    use_thumbnail=True,
    shuffle=2,
    image_mean=(0.485, 0.456, 0.406),
    image_std=(0.229, 0.224, 0.225),
)
QWEN2, INTERNLM2 = 151674, 92553  # ids


def _released(n_ids: int, *sizes: int, head_dim: int = 128) -> Released:
    """InternViT-300M, the projector, and a decoder."""
    names = ("hidden_size", "n_layers", "n_heads", "n_kv_heads", "ffn_size")
    decoder = Decoder(
        precision="f16",
        vocab_size=n_ids,
        additional_vocab_size=0,
        max_sequence_length=32768,
        tied_head=False,
        head_dim=head_dim,
        **dict(zip(names, sizes, strict=True)),
    )
    vision = Vision(
        precision="fp16",
        n_layers=24,
        hidden_size=1024,
        output_size=decoder.hidden_size,
        n_heads=16,
        ffn_size=4096,
        feature_size=4096,
        projector_size=decoder.hidden_size,
    )
    return Released(IMAGE_PROCESSOR, vision, decoder)


RELEASED = {
    "internvl2.5-1b": _released(QWEN2, 896, 24, 14, 2, 4864, head_dim=64),
    "internvl2.5-2b": _released(INTERNLM2, 2048, 24, 16, 8, 8192),
    "internvl2.5-4b": _released(QWEN2, 2048, 36, 16, 2, 11008),
    "internvl2.5-8b": _released(INTERNLM2, 4096, 32, 32, 8, 14336),
    "internvl3-1b": _released(QWEN2, 896, 24, 14, 2, 4864, head_dim=64),
    "internvl3-2b": _released(QWEN2, 1536, 28, 12, 2, 8960),
    "internvl3-8b": _released(QWEN2, 3584, 28, 28, 4, 18944),
}
