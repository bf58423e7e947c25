"""The released jina-vlm's settings, for planning without its weights.

Source: config.json and preprocessor_config.json of ``jinaai/jina-vlm`` on Hugging Face.
"""

from edge_vlm.families.base import Released
from edge_vlm.families.jina_vlm.tiling import JinaImageProcessor
from edge_vlm.families.sizes import Decoder, Vision

IMAGE_PROCESSOR = JinaImageProcessor(
    patch_size=14,
    base_input_size=(378, 378),
    overlap_margins=(4, 4),
    max_crops=12,
    min_pixels=3136,
    max_pixels=1003520,
    pooling_h=2,
    pooling_w=2,
    token_length_h=14,
    token_length_w=14,
    use_column_tokens=True,
)

VISION = Vision(
    precision="fp16",
    n_layers=25,  # of 27: nothing reads the last two
    hidden_size=1152,
    output_size=2048,
    n_heads=16,
    ffn_size=4304,
    feature_size=2304,
    projector_size=6144,
)

DECODER = Decoder(
    precision="f16",
    n_layers=28,
    hidden_size=2048,
    ffn_size=6144,
    n_heads=16,
    n_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    additional_vocab_size=128,
    max_sequence_length=40960,
    tied_head=False,
)

RELEASED = {"jina-vlm": Released(IMAGE_PROCESSOR, VISION, DECODER)}
