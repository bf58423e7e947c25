"""The demo model's own small byte-level BPE, with Qwen2's splitting rule and special tokens."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Regex as TokenizersRegex
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from models.demo.data import make_picture
from models.demo.language import LANGUAGES
from models.demo.questions import TEMPLATES

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"|<EXTRA_TOKENS_{n}>|" for n in range(7)),
)
IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>")
VOCAB_SIZE = 1024


def corpus(n_pictures: int) -> Iterator[str]:
    """Prompts with answers, and the bare templates so that rare questions are covered."""
    for kind in TEMPLATES.values():
        for language in LANGUAGES:
            yield from kind[language]
    for seed in range(n_pictures):
        for question in make_picture(seed).questions:
            # What is printed in pictures stays in small pieces: letters are easier to read one by
            # one than as the rare merges that a lexicon would give.
            printed = question.family in ("reading", "chart", "receipt")
            yield f" User: {question.text} Assistant:"
            if not printed:
                yield f" {question.answer}"


def train_tokenizer(n_pictures: int = 1500) -> Tokenizer:
    """A tokenizer whose text tokens fill ids 0 .. VOCAB_SIZE - 1, image tokens after them."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(TokenizersRegex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TEXT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(n_pictures), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in TEXT_TOKENS + IMAGE_TOKENS]
    )
    if tokenizer.token_to_id(IMAGE_TOKENS[0]) != VOCAB_SIZE:
        raise ValueError("the text gave too few merges to fill the vocabulary")
    return tokenizer
