"""Released LLaVA-OneVision models' settings, for planning without their weights.

Source: config.json and preprocessor_config.json of ``llava-hf/llava-onevision-qwen2-0.5b-ov-hf``
and ``llava-hf/llava-onevision-qwen2-7b-ov-hf`` on Hugging Face.
"""

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


def _vision(output_size: int) -> Vision:
    """SigLIP-So400M without its last layer, and the projector."""
    return Vision(
        precision="fp16",
        n_layers=26,
        hidden_size=1152,
        output_size=output_size,
        n_heads=16,
        ffn_size=4304,
        feature_size=1152,
        projector_size=output_size,
    )


RELEASED = {
    "llava-onevision-0.5b": Released(
        IMAGE_PROCESSOR,
        _vision(896),
        Decoder(
            precision="f16",
            n_layers=24,
            hidden_size=896,
            ffn_size=4864,
            n_heads=14,
            n_kv_heads=2,
            head_dim=64,
            vocab_size=151646,
            additional_vocab_size=354,  # <image>, <video>, and rows without a token
            max_sequence_length=32768,
            tied_head=True,
        ),
    ),
    "llava-onevision-7b": Released(
        IMAGE_PROCESSOR,
        _vision(3584),
        Decoder(
            precision="f16",
            n_layers=28,
            hidden_size=3584,
            ffn_size=18944,
            n_heads=28,
            n_kv_heads=4,
            head_dim=128,
            vocab_size=151646,
            additional_vocab_size=482,
            max_sequence_length=32768,
            tied_head=False,
        ),
    ),
}
