"""The released jina-vlm's settings, for planning without its weights.

Source: config.json and preprocessor_config.json of ``jinaai/jina-vlm`` on Hugging Face.
"""

from edge_vlm import cost
from edge_vlm.bundle import Decoder, ImageProcessor, Vision
from edge_vlm.plan import ModelSizes

NAME = "jina-vlm"

IMAGE_PROCESSOR = ImageProcessor(
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

VISION_BYTES = {
    "fp32": 4.0,
    "fp16": 2.0,
    "int8": 1.0,
    "int8-static": 1.0,
    "int4": 0.625,
}  # a weight
EXTERNAL_DATA_BYTES = 256 << 20  # a larger vision graph has its weights in a second file
DECODER_PRECISIONS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs")


def model_sizes(vision: str = "fp16", decoder: str = "q4_k_m") -> ModelSizes:
    """Sizes of a bundle in these precisions: keys of ``VISION_BYTES`` and ``DECODER_PRECISIONS``.

    Norms and biases are left out: 0.1 % of the bytes.
    """
    geometry = DECODER.model_copy(update={"precision": decoder})
    widths = cost.VisionSizes.of(VISION)
    vision_bytes = round(widths.n_weights(IMAGE_PROCESSOR) * VISION_BYTES[vision])
    return ModelSizes(
        processor=IMAGE_PROCESSOR,
        vision=widths,
        vision_precision=vision,
        vision_bytes=vision_bytes,
        parsed_bytes=vision_bytes if vision_bytes <= EXTERNAL_DATA_BYTES else 0,
        decoder=geometry,
        decoder_bytes=sum(cost.gguf_bytes(geometry, decoder).values()),
    )
