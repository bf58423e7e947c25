"""A SentencePiece BPE in ``tokenizer.json``, checked to be what llama.cpp reproduces.

llama.cpp knows no merges: it joins whatever two neighbours together make a token, the one with the
smallest id first. The file's merges have to say the same. A space stands in front of each text
behind a special token; the runtime puts it there (``SentencePiecePrompt``).

Source: SentencePiece (arXiv 1808.06226); "legacy" in transformers' tokenizer of Llama.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from edge_vlm.bundle.json_text import shorten
from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.config_file import (
    MAX_VOCABULARY,
    Off,
    On,
    Part,
    is_text,
    parse_part,
    read_object,
)
from edge_vlm_export.checkpoint.tokenizer import (
    MAX_TOKEN_LENGTH,
    MAX_TOKENIZER_BYTES,
    NAMES,
    TOKENIZER_NAME,
    AddedToken,
    Tokenizer,
    TokenType,
    named_token,
)

SPACE = "\u2581"  # what a space is written as
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


class Pattern(Part):
    """What is replaced."""

    text: Literal[" "] = Field(validation_alias="String")


class Prepend(Part):
    """The first step: what the runtime does."""

    type: Literal["Prepend"]
    prepend: Literal["\u2581"]


class Replace(Part):
    """The second step."""

    type: Literal["Replace"]
    pattern: Pattern
    content: Literal["\u2581"]


class Steps(Part):
    """What happens to text before."""

    type: Literal["Sequence"]
    normalizers: Annotated[tuple[Prepend, Replace], Strict(False)]


class ByteFallback(Part):
    """Vocabulary and merges; their entries are checked one by one."""

    type: Literal["BPE"]
    dropout: None = None
    unk_token: Annotated[str, Field(min_length=1, max_length=200)]
    continuing_subword_prefix: Literal[""] | None = None
    end_of_word_suffix: Literal[""] | None = None
    byte_fallback: On
    ignore_merges: Off = False
    vocab: dict[Any, Any]
    merges: Annotated[list[Any], Field(max_length=MAX_VOCABULARY)]


class Added(AddedToken):
    """One of ``added_tokens``: no text is a token that is not special."""

    special: On
    normalized: bool = False


class SentencePieceFile(Part):
    """``tokenizer.json``."""

    normalizer: Steps
    pre_tokenizer: None = None
    added_tokens: Annotated[list[Added], Field(max_length=MAX_VOCABULARY)]
    model: ByteFallback


def read_sentencepiece(folder: Path, n_ids: int, template: str) -> Tokenizer:
    """Read the SentencePiece BPE in ``tokenizer.json`` for a token table of ``n_ids`` rows.

    Rows without a token get unused ones. ``template`` is the chat template.

    Raises:
        CheckpointError: malformed, or of another kind.
    """
    path = folder / TOKENIZER_NAME
    file = parse_part(SentencePieceFile, read_object(path, MAX_TOKENIZER_BYTES), path)
    ids = _vocabulary(file, path, n_ids)
    special = {added.content: added.id for added in file.added_tokens}
    for added in file.added_tokens:
        if added.normalized and added.content in template:
            raise CheckpointError(
                f"{path}: the special token {added.content} is normalized and in the chat template:"
                " no space would follow it, which is not supported"
            )
    texts = {token: text for text, token in ids.items()}
    for token in range(n_ids):
        ids.setdefault(texts.setdefault(token, f"[PAD{token}]"), token)
    if len(ids) != n_ids:
        raise CheckpointError(f"{path}: a token is called [PADn], as rows without a token are")
    types = [TokenType.UNUSED] * n_ids
    for text, token in file.model.vocab.items():
        types[token] = TokenType.BYTE if text in BYTES else TokenType.NORMAL
    for token in special.values():
        types[token] = TokenType.CONTROL
    types[ids[file.model.unk_token]] = TokenType.UNKNOWN
    pieces = {text: token for text, token in ids.items() if types[token] is TokenType.NORMAL}
    _check_merges(file.model.merges, pieces, path)
    _check_unreachable(ids.keys() - pieces.keys(), pieces, path)
    return Tokenizer(
        path=path,
        tokens=tuple(texts[token] for token in range(n_ids)),
        types=tuple(types),
        merges=(),
        special=special,
        normalizer=None,
        bos=begin_token(folder, special),
        model="llama",
        pre="default",
        scores=tuple(
            -float(n) if kind is TokenType.NORMAL else 0.0 for n, kind in enumerate(types)
        ),
    )


def _vocabulary(file: SentencePieceFile, path: Path, n_ids: int) -> dict[str, int]:
    """Ids of all texts, the added tokens' among them."""
    ids: dict[str, int] = {}
    texts: dict[int, str] = {}
    for text, token in [
        *file.model.vocab.items(),
        *((added.content, added.id) for added in file.added_tokens),
    ]:
        if not text or len(text) > MAX_TOKEN_LENGTH or not is_text(text) or "\0" in text:
            raise CheckpointError(f"{path}: token {shorten(text)} is no valid text")
        if type(token) is not int or not 0 <= token < n_ids:
            raise CheckpointError(
                f"{path}: token {shorten(text)} has id {shorten(token)},"
                f" config.json has {n_ids} ids"
            )
        if ids.setdefault(text, token) != token or texts.setdefault(token, text) != text:
            raise CheckpointError(
                f"{path}: token {shorten(text)} has id {token}, which contradicts"
                f" {shorten(texts.get(token, ids[text]))}"
            )
    lacking = [text for text in (*BYTES, file.model.unk_token) if text not in file.model.vocab]
    if lacking:
        raise CheckpointError(f"{path}: model.vocab lacks {lacking[0]}")
    return ids


def _check_merges(merges: list[Any], pieces: Mapping[str, int], path: Path) -> None:
    """They have to be all pairs that make a token, in the order of what they make."""
    pairs = set()
    last = 0
    for index, pair in merged_pairs(merges, pieces, path):
        made = pieces["".join(pair)]
        if made < last:
            raise CheckpointError(
                f"{path}: model.merges[{index}] is {shorten(merges[index])}, out of the order of"
                " the ids, which is llama.cpp's"
            )
        last = made
        pairs.add(pair)
    check_complete(pairs, pieces, pieces, path)


def merged_pairs(
    merges: list[Any], vocabulary: Container[str], path: Path
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Index and parts of each merge.

    Raises:
        CheckpointError: one does not make a token of two.
    """
    for index, item in enumerate(merges):
        pair = item.split(" ") if isinstance(item, str) else item
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(part, str) and part in vocabulary for part in pair)
            or pair[0] + pair[1] not in vocabulary
        ):
            raise CheckpointError(
                f"{path}: model.merges[{index}] is {shorten(item)}, expected two tokens"
                " that together make a token"
            )
        yield index, (pair[0], pair[1])


def check_complete(
    pairs: Container[tuple[str, str]],
    texts: Iterable[str],
    vocabulary: Container[str],
    path: Path,
) -> None:
    """Whether ``pairs`` has all that llama.cpp would join to one of ``texts``.

    Raises:
        CheckpointError: it lacks one.
    """
    for text in texts:
        for pair in _splits(text, vocabulary):
            if pair not in pairs:
                raise CheckpointError(
                    f"{path}: model.merges lacks {shorten(list(pair))}, which llama.cpp would join"
                )


def _check_unreachable(texts: Collection[str], pieces: Mapping[str, int], path: Path) -> None:
    """No text that a user types may become a special token, a byte or a row without a token."""
    for text in texts:
        if any(_splits(text, pieces)):
            raise CheckpointError(
                f"{path}: llama.cpp would also find {shorten(text)} in text that a user typed"
            )


def _splits(text: str, pieces: Container[str]) -> Iterator[tuple[str, str]]:
    """The two parts that llama.cpp would join to ``text``; any character may be one."""
    for place in range(1, len(text)):
        parts = text[:place], text[place:]
        if all(len(part) == 1 or part in pieces for part in parts):
            yield parts


def begin_token(folder: Path, special: Mapping[str, int]) -> int | None:
    """The token in front of every prompt, unless the settings leave it out."""
    path = folder / NAMES[0]
    if path.exists() and read_object(path).get("add_bos_token") is False:
        return None
    return named_token(folder, special, "bos_token")
