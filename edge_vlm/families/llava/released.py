"""Released models' settings, for planning without their weights.

Source: config.json and preprocessor_config.json of ``llava-hf/llava-1.5-7b-hf`` and
``llava-hf/llava-v1.6-mistral-7b-hf`` on Hugging Face; for the larger LLaVA-1.5, "Improved Baselines
with Visual Instruction Tuning" (arXiv 2310.03744).
"""

from __future__ import annotations

from edge_vlm.families.base import Released
from edge_vlm.families.llava.crop import Llava15ImageProcessor
from edge_vlm.families.llava.tiles import LlavaNextImageProcessor
from edge_vlm.families.llava_like import CLIP_MEAN, CLIP_STD, PatchProcessor
from edge_vlm.families.sizes import Decoder, Vision

IMAGE_PROCESSOR = Llava15ImageProcessor(
    patch_size=14, tile_size=336, image_mean=CLIP_MEAN, image_std=CLIP_STD
)
NEXT_IMAGE_PROCESSOR = LlavaNextImageProcessor(
    patch_size=14,
    tile_size=336,
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
    grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
)


def _released(processor: PatchProcessor, n_positions: int, *sizes: int) -> Released:
    """CLIP ViT-L without its last block, the projector, and a decoder of 32,000 ids."""
    names = ("n_layers", "hidden_size", "ffn_size", "n_heads", "n_kv_heads")
    decoder = dict(zip(names, sizes, strict=True))
    width = decoder["hidden_size"]
    vision = Vision(
        precision="fp16",
        n_layers=23,
        hidden_size=1024,
        output_size=width,
        n_heads=16,
        ffn_size=4096,
        feature_size=1024,
        projector_size=width,
    )
    # The additional ids are <image>, <pad>, and rows without a token.
    common = {"precision": "f16", "vocab_size": 32000, "additional_vocab_size": 64}
    common |= {"head_dim": 128, "tied_head": False, "max_sequence_length": n_positions}
    return Released(processor, vision, Decoder.model_validate({**common, **decoder}))


RELEASED = {
    "llava-1.5-7b": _released(IMAGE_PROCESSOR, 4096, 32, 4096, 11008, 32, 32),
    "llava-1.5-13b": _released(IMAGE_PROCESSOR, 4096, 40, 5120, 13824, 40, 40),
}
NEXT_RELEASED = {
    "llava-next-mistral-7b": _released(NEXT_IMAGE_PROCESSOR, 32768, 32, 4096, 14336, 32, 8),
    "llava-next-vicuna-7b": _released(NEXT_IMAGE_PROCESSOR, 4096, 32, 4096, 11008, 32, 32),
}
