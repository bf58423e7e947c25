"""A byte-level BPE of any size, with Qwen2's splitting rule.

Its settings are in ``configs/byte-level``, its merges are made up: pieces of two letters, of three,
then pairs of two-letter pieces in a random order, each with and without the space in front, until
the vocabulary is full. English takes about twice as many tokens as with a trained vocabulary of
this size.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from edge_vlm.errors import InputError
from edge_vlm_export.checkpoint.tokenizer import TOKENIZER_NAME, byte_alphabet

MAX_MERGES = 26**2 + 2 * 26 + 2 * 26**2 + 26**3 + 2 * 26**4  # what ``_pairs`` yields
SPACE = "\u0120"  # how a byte-level vocabulary writes a space
_TEMPLATES = Path(__file__).parents[1] / "configs" / "byte-level"


def tokenizer_files(special: Mapping[str, int], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Content of ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

    Ids below the first special token, which ends a text, are bytes and merges.

    Raises:
        InputError: that leaves no room for bytes, or asks for more merges than there are.
    """
    end_of_text = min(special, key=special.__getitem__)
    size = special[end_of_text]
    if not 256 <= size <= 256 + MAX_MERGES:
        raise InputError(f"no tokenizer has {end_of_text} at {size}")
    others = [text for text in special if text != end_of_text]
    ends = {f"{role}_token": end_of_text for role in ("bos", "eos", "pad")}
    tokenizer, config = (
        json.loads((_TEMPLATES / name).read_text(encoding="utf-8"))
        for name in (TOKENIZER_NAME, "tokenizer_config.json")
    )
    added = {number: {**_token(text), "special": True} for text, number in special.items()}
    tokenizer["added_tokens"] = [{"id": number, **token} for number, token in added.items()]
    tokenizer["model"]["vocab"], tokenizer["model"]["merges"] = _vocabulary(size, seed)
    config["added_tokens_decoder"] = {str(number): token for number, token in added.items()}
    config |= {"additional_special_tokens": others, **ends}
    return {
        TOKENIZER_NAME: tokenizer,
        "tokenizer_config.json": config,
        "special_tokens_map.json": {
            "additional_special_tokens": [_token(text) for text in others],
            **{role: _token(text) for role, text in ends.items()},
        },
    }


def _vocabulary(size: int, seed: int) -> tuple[dict[str, int], list[list[str]]]:
    """``size`` tokens with their ids, and the merges that make all but the 256 bytes."""
    vocabulary = {text: index for index, text in enumerate(byte_alphabet())}
    merges: list[list[str]] = []
    pairs = _pairs(random.Random(seed))  # noqa: S311 - made up, not secret
    for pair in islice(pairs, size - len(vocabulary)):
        vocabulary["".join(pair)] = len(vocabulary)
        merges.append(list(pair))
    return vocabulary, merges


def _pairs(order: random.Random) -> Iterator[tuple[str, str]]:
    """Pairs of known tokens; no two make the same text."""
    letters = ascii_lowercase
    two = ["".join(pair) for pair in product(letters, repeat=2)]
    yield from product(letters, letters)
    yield from product([SPACE], ascii_uppercase + letters)
    yield from product(ascii_uppercase, letters)
    yield from product([SPACE], two)
    yield from product(two, letters)
    four = list(product(two, two))
    order.shuffle(four)
    for left, right in four:
        yield left, right
        yield f"{SPACE}{left}", right


def _token(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **flags}
