"""InternLM2's tokenizer, a SentencePiece BPE that puts no space in front of a text.

The original layout has it as ``tokenizer.model``, a protobuf message (sentencepiece_model.proto),
that of transformers as ``tokenizer.json``. llama.cpp knows scores and no merges: it joins whatever
two neighbours make a token, the one with the highest score first, as SentencePiece does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from edge_vlm.bundle.json_text import read_bounded, shorten
from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.config_file import (
    MAX_VOCABULARY,
    Off,
    Part,
    check_is_itself,
    is_text,
    missing,
    parse_part,
    read_object,
)
from edge_vlm_export.checkpoint.sentencepiece import (
    BYTES,
    ByteFallback,
    begin_token,
    check_complete,
    merged_pairs,
)
from edge_vlm_export.checkpoint.tokenizer import (
    MAX_TOKEN_LENGTH,
    MAX_TOKENIZER_BYTES,
    TOKENIZER_NAME,
    AddedToken,
    Tokenizer,
    TokenType,
)

MODEL_NAME = "tokenizer.model"
_BPE = 2  # of TrainerSpec.model_type


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: TokenType


def read_model(folder: Path, n_ids: int, added: list[Any]) -> Tokenizer:
    """``tokenizer.model`` with what ``added`` puts over it and behind it.

    Raises:
        CheckpointError: malformed, or of another kind.
    """
    path = folder / MODEL_NAME
    if not path.exists():
        raise CheckpointError(f"{path}: {missing(path)}")
    data = read_bounded(path, MAX_TOKENIZER_BYTES, CheckpointError)
    check_is_itself(path, data[:256])
    try:
        pieces = list(_pieces(data))
    except (ValueError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"{path}: is no SentencePiece model ({error})") from error
    tokens = [parse_part(AddedToken, token, path, "added_tokens.") for token in added]
    return _tokenizer(path, dict(enumerate(pieces)), tokens, n_ids)


def _pieces(data: bytes) -> Iterator[Piece]:
    """Those of a ModelProto: pieces, then how the model was trained, then its normalizer."""
    trained: dict[int, Any] = {}
    normalizes: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            told = dict(_fields(value))
            text, score, kind = told.get(1, b""), told.get(2, 0.0), told.get(3, 1)
            if type(text) is not bytes or type(score) is not float or type(kind) is not int:
                raise ValueError("a piece is malformed")
            yield Piece(text.decode(), score, _kind(text.decode(), TokenType(kind)))
        elif number == 2 and isinstance(value, bytes):
            trained = dict(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizes = dict(_fields(value))
    if trained.get(3, 1) != _BPE or not trained.get(35, 0):
        raise ValueError("expected a BPE with byte fallback")
    if normalizes.get(1, b"identity") != b"identity" or normalizes.get(2):
        raise ValueError("its normalizer is not the identity")
    for number, name in ((3, "add_dummy_prefix"), (4, "remove_extra_whitespaces")):
        if normalizes.get(number, 1):
            raise ValueError(f"its {name} is true, expected false")
    if not normalizes.get(5, 1):
        raise ValueError("its escape_whitespaces is false, expected true")


def _kind(text: str, kind: TokenType) -> TokenType:
    """llama.cpp knows no text of the null character, which bytes stand for then."""
    return TokenType.UNUSED if text.startswith("[UNUSED") or "\0" in text else kind


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Number and value of each field of a protobuf message."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire, value = key & 7, data[position : position + 8]
        if wire == 0:
            number, position = _varint(data, position)
            yield key >> 3, number
        elif wire == 1:
            yield key >> 3, struct.unpack("<d", value)[0]
            position += 8
        elif wire == 5:
            yield key >> 3, struct.unpack("<f", value[:4])[0]
            position += 4
        elif wire == 2:
            length, position = _varint(data, position)
            if length > len(data) - position:
                raise ValueError("it is cut off")
            yield key >> 3, data[position : position + length]
            position += length
        else:
            raise ValueError(f"unknown wire type {wire}")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it is cut off")
        value |= (data[position] & 0x7F) << shift
        position += 1
        if data[position - 1] < 0x80:
            return value, position
    raise ValueError("a number is too long")


class Metaspace(Part):
    """What a space is written as; nothing is put in front."""

    type: Literal["Metaspace"]
    replacement: Literal["\u2581"]
    prepend_scheme: Literal["never"]
    split: Off


class Pieces(ByteFallback):
    """Vocabulary and merges, perhaps without a token for what is unknown."""

    unk_token: str | None = None  # type: ignore[assignment]  # wider than there


class SentencePieceFile(Part):
    """``tokenizer.json``."""

    normalizer: None = None
    pre_tokenizer: Metaspace
    added_tokens: Annotated[list[AddedToken], Field(max_length=MAX_VOCABULARY)]
    model: Pieces


def read_file(folder: Path, n_ids: int) -> Tokenizer:
    """The same from ``tokenizer.json``; the scores are the places of its merges.

    Raises:
        CheckpointError: malformed, or of another kind.
    """
    path = folder / TOKENIZER_NAME
    file = parse_part(SentencePieceFile, read_object(path, MAX_TOKENIZER_BYTES), path)
    vocab = file.model.vocab
    for text, number in vocab.items():
        if type(number) is not int:
            raise CheckpointError(f"{path}: token {shorten(text)} has id {shorten(number)}")
    special = {token.content for token in file.added_tokens if token.special}
    scores = _scores(file.model.merges, vocab, special, path)
    pieces = {}
    for text, number in vocab.items():
        kind = TokenType.BYTE if text in BYTES else _kind(text, TokenType.NORMAL)
        kind = TokenType.UNKNOWN if text == file.model.unk_token else kind
        if number in pieces:
            raise CheckpointError(f"{path}: token {shorten(text)} shares id {number}")
        pieces[number] = Piece(text, scores.get(text, 0.0), kind)
    return _tokenizer(path, pieces, file.added_tokens, n_ids)


def _scores(
    merges: list[Any], vocab: Mapping[str, int], special: set[str], path: Path
) -> dict[str, float]:
    """Of each text that merges make; the earlier, the higher."""
    scores: dict[str, float] = {}
    pairs = set()
    last = None
    for index, pair in merged_pairs(merges, vocab, path):
        made = "".join(pair)
        if made in scores and made != last:
            raise CheckpointError(
                f"{path}: model.merges[{index}] makes {shorten(made)} again, between others;"
                " llama.cpp knows one place of it"
            )
        scores.setdefault(made, -float(index))
        pairs.add(pair)
        last = made
    # Special ones the runtime keeps out of what a user typed.
    check_complete(pairs, vocab.keys() - special, vocab, path)
    return scores


def _tokenizer(
    path: Path, pieces: dict[int, Piece], added: list[AddedToken], n_ids: int
) -> Tokenizer:
    """The vocabulary with the added tokens."""
    for token in added:
        kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        replaced = pieces.get(token.id)
        if replaced and replaced.kind in (TokenType.UNKNOWN, TokenType.CONTROL):
            kind = replaced.kind
        elif replaced and replaced.kind is not TokenType.UNUSED and replaced.text != token.content:
            raise CheckpointError(
                f"{path}: added token {shorten(token.content)} has id {token.id},"
                f" which is {shorten(replaced.text)}"
            )
        pieces[token.id] = Piece(token.content, 0.0, kind)
    rows = _rows(path, pieces, n_ids)
    special = {row.text: n for n, row in enumerate(rows) if row.kind is TokenType.CONTROL}
    special |= {token.content: token.id for token in added if token.special}
    return Tokenizer(
        path=path,
        tokens=tuple(row.text for row in rows),
        types=tuple(row.kind for row in rows),
        merges=(),
        special=special,
        normalizer=None,
        bos=begin_token(path.parent, special),
        model="llama",
        pre="default",
        scores=tuple(row.score for row in rows),
    )


def _rows(path: Path, pieces: Mapping[int, Piece], n_ids: int) -> list[Piece]:
    """One for each id; those without a token get unused ones."""
    if max(pieces, default=0) >= n_ids:
        raise CheckpointError(f"{path}: has id {max(pieces)}, config.json has {n_ids} ids")
    known = {piece.text for piece in pieces.values()}
    lacking = [text for text in BYTES if text not in known]
    if lacking:
        raise CheckpointError(f"{path}: lacks the token {lacking[0]}")
    for text in known:
        if not text or len(text) > MAX_TOKEN_LENGTH or not is_text(text):
            raise CheckpointError(f"{path}: token {shorten(text)} is no valid text")
    rows = [pieces.get(number) for number in range(n_ids)]
    named = [
        row if row and "\0" not in row.text else Piece(f"[PAD{number}]", 0.0, TokenType.UNUSED)
        for number, row in enumerate(rows)
    ]
    if len({row.text for row in named}) != n_ids:
        raise CheckpointError(f"{path}: two ids have the same token")
    return named
