"""A checkpoint's tokenizer, checked to be of a kind that llama.cpp reproduces.

Any other rule would give other tokens for the same text without a word of warning, so it is
refused. A byte-level BPE has the splitting rule of Qwen2 (https://arxiv.org/abs/2407.10671) or of
Llama 3 (https://arxiv.org/abs/2407.21783), after Unicode NFC or no normalization.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, field_validator, model_validator

from edge_vlm.bundle.json_text import shorten, wrong
from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.config_file import (
    MAX_VOCABULARY,
    Off,
    Part,
    is_text,
    parse_part,
    read_object,
)

TOKENIZER_NAME = "tokenizer.json"
NAMES = ("tokenizer_config.json", "special_tokens_map.json")  # name the roles of tokens
MAX_TOKENIZER_BYTES = 32 << 20  # Qwen's has 11 MB
MAX_TOKEN_LENGTH = 1 << 12

_QWEN2 = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# By llama.cpp's names: as published, and with the case-insensitive part spelled out.
SPLITS = {
    "qwen2": (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)" + _QWEN2,
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])" + _QWEN2,
    ),
    # Llama 3's, which a Pixtral in transformers' layout has.
    "pixtral": (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)" + _LLAMA3,
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])" + _LLAMA3,
    ),
}
# With these, llama.cpp takes a whole piece that is a token as that, whatever the merges say.
WHOLE_PIECES = ("pixtral",)
RULES = {regex: name for name, regexes in SPLITS.items() for regex in regexes}
# llama.cpp turns these into ordinary tokens whatever the file says, so typed text could become one.
_UNPROTECTED = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class TokenType(IntEnum):
    """Token types of GGUF that are used here."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


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


class AddedToken(Part):
    """One of ``added_tokens``."""

    id: Annotated[int, Field(ge=0)]
    content: Annotated[str, Field(min_length=1, max_length=200)]
    special: bool
    single_word: Off = False
    lstrip: Off = False
    rstrip: Off = False


class SplitPattern(Part):
    """The rule by which text is cut before bytes are merged."""

    regex: str = Field(validation_alias="Regex")

    @field_validator("regex")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in RULES:
            raise wrong("", value, f"which is not the splitting rule of {' or '.join(SPLITS)}")
        return value


class Split(Part):
    """The first step."""

    type: Literal["Split"]
    behavior: Literal["Isolated"]
    invert: Off = False
    pattern: SplitPattern


class ByteLevel(Part):
    """The second step."""

    type: Literal["ByteLevel"]
    add_prefix_space: Off = False
    use_regex: Off = False


class Steps(Part):
    """How text is cut."""

    type: Literal["Sequence"]
    pretokenizers: Annotated[tuple[Split, ByteLevel], Strict(False)]


class Normalizer(Part):
    """What happens to text before."""

    type: Literal["NFC"]


class BPE(Part):
    """Vocabulary and merges; their entries are checked one by one."""

    type: Literal["BPE"]
    dropout: None = None
    unk_token: None = None
    continuing_subword_prefix: Literal[""] | None = None
    end_of_word_suffix: Literal[""] | None = None
    byte_fallback: Off = False
    ignore_merges: bool = False
    vocab: dict[Any, Any]
    merges: Annotated[list[Any], Field(max_length=MAX_VOCABULARY)]


class ByteLevelFile(Part):
    """``tokenizer.json``; how a trainer padded and truncated its batches changes no token."""

    normalizer: Normalizer | None = None
    pre_tokenizer: Steps
    added_tokens: Annotated[list[AddedToken], Field(max_length=MAX_VOCABULARY)]
    model: BPE

    @property
    def rule(self) -> str:
        """The splitting rule's name."""
        return RULES[self.pre_tokenizer.pretokenizers[0].pattern.regex]

    @model_validator(mode="after")
    def _agrees(self) -> ByteLevelFile:
        rule, told = self.rule, self.model.ignore_merges
        if told is not (rule in WHOLE_PIECES):
            raise wrong("model.ignore_merges", told, f"which contradicts the splitting rule {rule}")
        return self


def read_byte_level(folder: Path, n_ids: int) -> Tokenizer:
    """Read the byte-level BPE in ``tokenizer.json`` for a token table of ``n_ids`` rows.

    Rows without a token get unused ones. ``bos`` is left to the family.

    Raises:
        CheckpointError: malformed, or of another kind.
    """
    path = folder / TOKENIZER_NAME
    return byte_level(read_object(path, MAX_TOKENIZER_BYTES), path, n_ids)


def byte_level(data: Mapping[str, Any], path: Path, n_ids: int) -> Tokenizer:
    """``read_byte_level`` for what such a file holds; ``path`` is named in errors."""
    file = parse_part(ByteLevelFile, data, path)
    texts = _vocabulary(file.model.vocab, path, n_ids)
    types = dict.fromkeys(texts, TokenType.NORMAL)
    special: dict[str, int] = {}
    for index, token in enumerate(file.added_tokens):
        _check_added(token, f"{path}: added_tokens[{index}]", path, n_ids)
        if texts.setdefault(token.id, token.content) != token.content:
            raise CheckpointError(
                f"{path}: added token {shorten(token.content)} has id {token.id},"
                f" which is {shorten(texts[token.id])}"
            )
        types[token.id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        if token.special:
            special[token.content] = token.id
    tokens = tuple(texts.get(token, f"[PAD{token}]") for token in range(n_ids))
    if len(set(tokens)) != n_ids:
        twice = Counter(tokens).most_common(1)[0][0]
        raise CheckpointError(f"{path}: token {shorten(twice)} has two ids")
    return Tokenizer(
        path=path,
        tokens=tokens,
        types=tuple(types.get(token, TokenType.UNUSED) for token in range(n_ids)),
        merges=_merges(file.model.merges, path, tokens),
        special=special,
        normalizer=file.normalizer.type if file.normalizer else None,
        pre=file.rule,
    )


def _vocabulary(vocab: Mapping[Any, Any], path: Path, n_ids: int) -> dict[int, str]:
    texts: dict[int, str] = {}
    for text, token in vocab.items():
        if type(token) is not int or not 0 <= token < n_ids:
            raise CheckpointError(
                f"{path}: token {shorten(text)} has id {shorten(token)},"
                f" config.json has {n_ids} ids"
            )
        if token in texts:
            raise CheckpointError(
                f"{path}: tokens {shorten(texts[token])} and {shorten(text)} share id {token}"
            )
        _check_text(text, path)
        texts[token] = text
    missing = set(byte_alphabet()) - set(texts.values())
    if missing:
        raise CheckpointError(
            f"{path}: model.vocab lacks {len(missing)} of the 256 byte tokens,"
            f" {shorten(min(missing))} for one"
        )
    return texts


def _check_added(token: AddedToken, where: str, path: Path, n_ids: int) -> None:
    if token.id >= n_ids:
        raise CheckpointError(f"{where}.id is {token.id}, config.json has {n_ids} ids")
    _check_text(token.content, path)
    if token.special and token.content in _UNPROTECTED:
        raise CheckpointError(
            f"{where}.content is {shorten(token.content)}, which llama.cpp would also recognize in"
            " text that a user typed"
        )


def _merges(listed: list[Any], path: Path, tokens: tuple[str, ...]) -> tuple[str, ...]:
    known = set(tokens)
    merges = []
    for index, item in enumerate(listed):
        pair = item.split(" ") if isinstance(item, str) else item
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(part, str) and part and " " not in part for part in pair)
            or not {pair[0], pair[1], pair[0] + pair[1]} <= known
        ):
            raise CheckpointError(
                f"{path}: model.merges[{index}] is {shorten(item)}, expected two tokens"
                " that together make a token"
            )
        merges.append(f"{pair[0]} {pair[1]}")
    return tuple(merges)


def _check_text(text: str, path: Path) -> None:
    if not text or len(text) > MAX_TOKEN_LENGTH or not is_text(text) or "\0" in text:
        raise CheckpointError(f"{path}: token {shorten(text)} is no valid text")


def named_token(folder: Path, special: Mapping[str, int], *roles: str) -> int | None:
    """Id of the first of ``roles`` (bos_token, eos_token) that the files beside the tokenizer name.

    Raises:
        CheckpointError: it is no special token.
    """
    files = {name: read_object(folder / name) for name in NAMES if (folder / name).exists()}
    for role in roles:
        for name, data in files.items():
            value: Any = data.get(role)
            if isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if not isinstance(value, str) or value not in special:
                raise CheckpointError(
                    f"{folder / name}: {role} is {shorten(value)}, which is no special token of"
                    f" {TOKENIZER_NAME}"
                )
            return special[value]
    return None


def byte_alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = range(256 - len(printable))
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in others]
