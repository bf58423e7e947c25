"""A checkpoint's tokenizer, checked to be of a kind that llama.cpp reproduces.

Any other rule would give other tokens for the same text without a word of warning, so it is
refused. A byte-level BPE has the splitting rule of Qwen2 (https://arxiv.org/abs/2407.10671), after
Unicode NFC or no normalization.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.json_file import Section, is_text, read_json, shorten

TOKENIZER_NAME = "tokenizer.json"
NAMES = ("tokenizer_config.json", "special_tokens_map.json")  # name the roles of tokens
MAX_TOKENIZER_BYTES = 32 << 20  # Qwen's has 11 MB
MAX_TOKEN_LENGTH = 1 << 12
MAX_VOCABULARY = 1 << 24

# The rule as Qwen publishes it, and with its case-insensitive part spelled out.
SPLITS = tuple(
    contractions
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for contractions in (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    )
)
# llama.cpp turns these into ordinary tokens whatever the file says, so typed text could become one.
_UNPROTECTED = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class TokenType(IntEnum):
    """Token types of GGUF that are used here."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class Tokenizer:
    """Vocabulary and merges, as they go into the GGUF."""

    path: Path
    tokens: tuple[str, ...]  # one text for each row of the token table
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]  # "left right", best first
    special: dict[str, int]
    normalizer: Literal["NFC"] | None
    bos: int | None = None  # in front of every prompt
    model: str = "gpt2"  # the kind, by llama.cpp's name
    pre: str = "qwen2"  # the splitting rule, likewise
    scores: tuple[float, ...] = ()  # of a SentencePiece vocabulary

    def id_of(self, text: str) -> int:
        """The id of a special token.

        Raises:
            CheckpointError: there is none of that text.
        """
        if text not in self.special:
            raise CheckpointError(f"{self.path}: added_tokens has no special token {text}")
        return self.special[text]


def read_byte_level(folder: Path, n_ids: int) -> Tokenizer:
    """Read the byte-level BPE in ``tokenizer.json`` for a token table of ``n_ids`` rows.

    Rows without a token get unused ones. ``bos`` is left to the family.

    Raises:
        CheckpointError: malformed, or of another kind.
    """
    data = read_json(folder / TOKENIZER_NAME, MAX_TOKENIZER_BYTES)
    model = data.section("model")
    _check_kind(data, model)
    texts = _vocabulary(model, n_ids)
    types = dict.fromkeys(texts, TokenType.NORMAL)
    special: dict[str, int] = {}
    for content, token, is_special in _added_tokens(data, n_ids):
        if texts.setdefault(token, content) != content:
            raise CheckpointError(
                f"{data.path}: added token {shorten(content)} has id {token},"
                f" which is {shorten(texts[token])}"
            )
        types[token] = TokenType.CONTROL if is_special else TokenType.USER_DEFINED
        if is_special:
            special[content] = token
    for token in range(n_ids):
        texts.setdefault(token, f"[PAD{token}]")
        types.setdefault(token, TokenType.UNUSED)
    tokens = tuple(texts[token] for token in range(n_ids))
    if len(set(tokens)) != n_ids:
        twice = Counter(tokens).most_common(1)[0][0]
        raise CheckpointError(f"{data.path}: token {shorten(twice)} has two ids")
    return Tokenizer(
        path=data.path,
        tokens=tokens,
        types=tuple(types[token] for token in range(n_ids)),
        merges=_merges(model, tokens),
        special=special,
        normalizer=_normalizer(data),
    )


def _check_kind(data: Section, model: Section) -> None:
    model.only("type", "BPE")
    for key in ("dropout", "unk_token"):
        model.only(key, None)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        model.only(key, None, "")
    model.only("byte_fallback", False)
    model.only("ignore_merges", False)
    data.only("truncation", None)
    data.only("padding", None)
    rules = data.section("pre_tokenizer")
    rules.only("type", "Sequence")
    steps = rules.array("pretokenizers", 2)
    if len(steps) != 2 or not all(isinstance(step, dict) for step in steps):
        raise rules.error("pretokenizers", "expected a Split and a ByteLevel rule")
    split, byte_level = (
        Section(step, data.path, f"pre_tokenizer.pretokenizers[{index}].")
        for index, step in enumerate(steps)
    )
    split.only("type", "Split")
    split.only("behavior", "Isolated")
    split.only("invert", False)
    pattern = split.section("pattern")
    if pattern.data.get("Regex") not in SPLITS:
        raise pattern.error("Regex", "which is not the splitting rule of Qwen2")
    byte_level.only("type", "ByteLevel")
    byte_level.only("add_prefix_space", False)
    byte_level.only("use_regex", False)


def _normalizer(data: Section) -> Literal["NFC"] | None:
    if data.data.get("normalizer") is None:
        return None
    data.section("normalizer").only("type", "NFC")
    return "NFC"


def _vocabulary(model: Section, n_ids: int) -> dict[int, str]:
    texts: dict[int, str] = {}
    for text, token in model.section("vocab").data.items():
        if type(token) is not int or not 0 <= token < n_ids:
            raise CheckpointError(
                f"{model.path}: token {shorten(text)} has id {shorten(token)},"
                f" config.json has {n_ids} ids"
            )
        if token in texts:
            raise CheckpointError(
                f"{model.path}: tokens {shorten(texts[token])} and {shorten(text)} share id {token}"
            )
        _check_text(text, model)
        texts[token] = text
    missing = set(byte_alphabet()) - set(texts.values())
    if missing:
        raise CheckpointError(
            f"{model.path}: model.vocab lacks {len(missing)} of the 256 byte tokens,"
            f" {shorten(min(missing))} for one"
        )
    return texts


def _added_tokens(data: Section, n_ids: int) -> Iterator[tuple[str, int, bool]]:
    """(text, id, whether special) of every added token."""
    for index, item in enumerate(data.array("added_tokens", MAX_VOCABULARY)):
        if not isinstance(item, dict):
            raise CheckpointError(f"{data.path}: added_tokens[{index}] is no object")
        entry = Section(item, data.path, f"added_tokens[{index}].")
        for key in ("single_word", "lstrip", "rstrip"):
            entry.only(key, False)
        content = entry.string("content", 200)
        _check_text(content, data)
        is_special = entry.boolean("special")
        if is_special and content in _UNPROTECTED:
            raise entry.error(
                "content", "which llama.cpp would also recognize in text that a user typed"
            )
        yield content, entry.integer("id", 0, n_ids - 1), is_special


def _merges(model: Section, tokens: tuple[str, ...]) -> tuple[str, ...]:
    known = set(tokens)
    merges = []
    for index, item in enumerate(model.array("merges", MAX_VOCABULARY)):
        pair = item.split(" ") if isinstance(item, str) else item
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(part, str) and part and " " not in part for part in pair)
            or not {pair[0], pair[1], pair[0] + pair[1]} <= known
        ):
            raise CheckpointError(
                f"{model.path}: model.merges[{index}] is {shorten(item)}, expected two tokens"
                " that together make a token"
            )
        merges.append(f"{pair[0]} {pair[1]}")
    return tuple(merges)


def _check_text(text: str, section: Section) -> None:
    if not text or len(text) > MAX_TOKEN_LENGTH or not is_text(text) or "\0" in text:
        raise CheckpointError(f"{section.path}: token {shorten(text)} is no valid text")


def named_token(folder: Path, special: Mapping[str, int], *roles: str) -> int | None:
    """Id of the first of ``roles`` (bos_token, eos_token) that the files beside the tokenizer name.

    Raises:
        CheckpointError: it is no special token.
    """
    sections = [read_json(folder / name) for name in NAMES if (folder / name).exists()]
    for role in roles:
        for section in sections:
            value: Any = section.data.get(role)
            if isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if not isinstance(value, str) or value not in special:
                raise section.error(role, f"which is no special token of {TOKENIZER_NAME}")
            return special[value]
    return None


def byte_alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = range(256 - len(printable))
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in others]
