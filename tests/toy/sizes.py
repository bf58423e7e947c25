"""A jina-vlm of next to nothing: crops of 20x20 pixels, nine vectors each, a byte a token."""

from __future__ import annotations

from edge_vlm.families.jina_vlm.family import JinaVLM
from edge_vlm.families.jina_vlm.tiling import JinaImageProcessor, JinaPrompt, JinaTokens
from edge_vlm.families.sizes import Decoder, Vision

HIDDEN = 8
N_MARKERS = JinaVLM.n_markers
PROCESSOR = JinaImageProcessor(
    patch_size=4,
    base_input_size=(20, 20),
    overlap_margins=(1, 1),
    max_crops=6,
    min_pixels=64,
    max_pixels=3600,
    pooling_h=2,
    pooling_w=2,
    token_length_h=3,
    token_length_w=3,
    use_column_tokens=True,
)
VISION = Vision(
    precision="fp32", n_layers=2, hidden_size=HIDDEN, output_size=HIDDEN, n_heads=1, ffn_size=8
)

# Ids 0 to 255 are bytes, as text is tokenized; those of words are only generated.
WORDS = (" the", " cat", "Hello", " \N{GREEK SMALL LETTER ALPHA}", " 42")
END, TURN, FIRST_WORD = 256, 257, 258
VOCAB_SIZE = FIRST_WORD + len(WORDS)
READ_ONLY = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")  # never generated
IM_START, IM_END, IM_PATCH, IM_COL, IMAGE = range(VOCAB_SIZE, VOCAB_SIZE + len(READ_ONLY))
N_IDS = VOCAB_SIZE + len(READ_ONLY)

DECODER = Decoder(
    precision="f16",
    n_layers=2,
    hidden_size=HIDDEN,
    ffn_size=8,
    n_heads=1,
    n_kv_heads=1,
    head_dim=HIDDEN,
    vocab_size=VOCAB_SIZE,
    additional_vocab_size=len(READ_ONLY),
    max_sequence_length=4096,
    tied_head=True,
)
TOKENS = JinaTokens(
    bos=END,
    stop=(END, TURN),
    im_start=IM_START,
    im_end=IM_END,
    im_patch=IM_PATCH,
    im_col=IM_COL,
    image=IMAGE,
    special={
        "<|endoftext|>": END,
        "<|im_end|>": TURN,
        **{text: VOCAB_SIZE + i for i, text in enumerate(READ_ONLY)},
    },
)
PROMPT = JinaPrompt(always_start_with_space=True, image_prompt_token="<|image|>", normalizer="NFC")  # noqa: S106
