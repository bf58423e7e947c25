"""Released Pixtral models' settings, for planning without their weights.

Source: config.json and preprocessor_config.json of ``mistral-community/pixtral-12b`` on Hugging
Face.
"""

from __future__ import annotations

from edge_vlm.families.base import Released
from edge_vlm.families.pixtral.processor import PixtralImageProcessor
from edge_vlm.families.sizes import Decoder, Vision

IMAGE_PROCESSOR = PixtralImageProcessor(
    patch_size=16,
    longest_edge=1024,
    max_patches=64 * 64,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)

RELEASED = {
    "pixtral-12b": Released(
        IMAGE_PROCESSOR,
        Vision(
            precision="fp16",
            n_layers=24,
            hidden_size=1024,
            output_size=5120,
            n_heads=16,
            ffn_size=4096,
            feature_size=1024,
            projector_size=5120,
        ),
        Decoder(
            precision="f16",
            n_layers=40,
            hidden_size=5120,
            ffn_size=14336,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            vocab_size=131072,
            additional_vocab_size=0,
            max_sequence_length=1024000,
            tied_head=False,
        ),
    )
}
