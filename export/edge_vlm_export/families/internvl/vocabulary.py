"""The tokenizer's files of the original layout: slow tokenizers, without tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from edge_vlm.bundle.json_text import shorten
from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.config_file import Part, read_object, read_part, read_text
from edge_vlm_export.checkpoint.tokenizer import (
    MAX_TOKENIZER_BYTES,
    NAMES,
    SPLITS,
    TOKENIZER_NAME,
    Tokenizer,
    byte_level,
)

ADDED, VOCABULARY, MERGES = "added_tokens.json", "vocab.json", "merges.txt"


class Names(Part):
    """``tokenizer_config.json`` and ``special_tokens_map.json``: which tokens are special."""

    tokenizer_class: str | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] = Field(default={})
    additional_special_tokens: list[Any] = Field(default=[])
    bos_token: Any = None
    eos_token: Any = None
    pad_token: Any = None
    unk_token: Any = None

    @property
    def special(self) -> set[str]:
        """Tokens with a role."""
        named = [self.bos_token, self.eos_token, self.pad_token, self.unk_token]
        named += self.additional_special_tokens
        texts = [value.get("content") if isinstance(value, dict) else value for value in named]
        return {text for text in texts if isinstance(text, str)}


def added_ids(folder: Path) -> dict[str, int]:
    """Tokens behind the vocabulary by their text, as far as the files tell.

    Raises:
        CheckpointError: a file is malformed.
    """
    return {token["content"]: token["id"] for token in added_tokens(folder) if "content" in token}


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """What tokenizer.json calls ``added_tokens``: from that, or from the files it is made of."""
    path = folder / TOKENIZER_NAME
    if path.exists():
        listed = read_object(path, MAX_TOKENIZER_BYTES).get("added_tokens")
        return [token for token in listed if _is_token(token)] if isinstance(listed, list) else []
    files = [read_part(Names, folder / name) for name in NAMES if (folder / name).exists()]
    special = {text for names in files for text in names.special}
    path = folder / ADDED
    found: dict[int, dict[str, Any]] = {}
    for text, number in (read_object(path) if path.exists() else {}).items():
        if type(number) is not int:
            raise CheckpointError(f"{path}: {shorten(text)} is {shorten(number)}, expected an id")
        found[number] = {"id": number, "content": text, "special": text in special}
    for names in files:
        for key, token in names.added_tokens_decoder.items():
            if key.isdecimal():
                number = int(key)
                found[number] = {"special": False, **token, "id": number}
    return [found[number] for number in sorted(found)]


def _is_token(token: Any) -> bool:
    return (
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
    )


def read_qwen2_files(folder: Path, n_ids: int) -> Tokenizer:
    """Qwen2's vocabulary and merges; the rules are the class's: NFC, and Qwen2's splitting rule.

    Raises:
        CheckpointError: a file is missing or malformed.
    """
    path = folder / VOCABULARY
    vocabulary = read_object(path, MAX_TOKENIZER_BYTES)
    lines = read_text(folder / MERGES, MAX_TOKENIZER_BYTES).split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    return byte_level(_as_file(vocabulary, merges, added_tokens(folder)), path, n_ids)


def _as_file(
    vocabulary: Mapping[str, Any], merges: list[str], added: list[dict[str, Any]]
) -> dict[str, Any]:
    """What ``tokenizer.json`` would hold."""
    split = {"type": "Split", "pattern": {"Regex": SPLITS["qwen2"][0]}, "behavior": "Isolated"}
    return {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": (split, {"type": "ByteLevel"})},
        "added_tokens": added,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
