"""Whether ``decoder.gguf`` is what the manifest says, found out before llama.cpp sees it.

llama.cpp ends the whole process where a size or a token list is not as it expects. What its header
tells is compared and bounded here; the rest is tried in a process of its own, see
``answering/trial.py``.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_vlm.bundle.gguf_header import (
    BOOL,
    FLOAT32,
    FLOAT64,
    INT32,
    TEXT,
    UINT32,
    Header,
    Tensor,
    Value,
    read_header,
)
from edge_vlm.errors import BundleError, label

if TYPE_CHECKING:
    from edge_vlm.families.sizes import Decoder

MAX_LAYERS = 512  # llama.cpp's own limit
_VOCABULARIES = ("gpt2", "llama")  # byte-level BPE and SentencePiece: the two that are exported
_MAX_TOKEN_TYPE = 6
_TOKEN_ID = re.compile(r"tokenizer\.ggml\.\w+_token_id")
_MISSING = object()


def check_decoder(path: Path, decoder: Decoder) -> None:
    """Check that the header of a GGUF is well-formed and says what the manifest says.

    Raises:
        BundleError: it is not, or it says something else; the message names what.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            check_header(read_header(data), decoder)
    except OSError as error:
        raise BundleError(f"{label(path)}: {error.strerror or error}") from error
    except ValueError as error:  # also of an empty file
        raise BundleError(f"{label(path)}: {error}") from error


def check_header(header: Header, decoder: Decoder) -> None:
    """Compare a header with the manifest's part about the decoder.

    Raises:
        ValueError: it says something else, or something that no model has.
    """
    entries = _Entries(header.values)
    architecture = entries.text("general.architecture")
    if not re.fullmatch(r"[a-z0-9_-]{1,60}", architecture):
        raise ValueError(f"general.architecture is {architecture[:60]!a}")
    if "split.count" in header.values:
        raise ValueError("is a part of a model, which reads other files")
    n_ids = decoder.vocab_size + decoder.additional_vocab_size
    _check_sizes(entries, architecture, decoder, n_ids)
    _check_numbers(entries, architecture)
    _check_vocabulary(entries, n_ids)
    _check_tensors(header.tensors, decoder, n_ids)


class _Entries:
    """The values by key, of the type that is expected."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = values

    def get(self, key: str, kinds: tuple[int, ...], default: Any, *, is_list: bool = False) -> Any:
        """The content, or the default.

        Raises:
            ValueError: it is missing and there is no default, or of another type.
        """
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise ValueError(f"lacks {key}")
            return default
        if value.kind not in kinds or value.is_list != is_list:
            raise ValueError(f"{key} is of another type than expected")
        return value.content

    def text(self, key: str, default: Any = _MISSING) -> str:
        """A text."""
        return bytes(self.get(key, (TEXT,), default)).decode("utf-8", "replace")

    def whole(self, key: str, default: Any = _MISSING) -> int:
        """A whole number."""
        return int(self.get(key, (UINT32, INT32), default))

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A fraction."""
        return float(self.get(key, (FLOAT32,), default))

    def list_of(self, key: str, kinds: tuple[int, ...], n: int, default: Any = _MISSING) -> Any:
        """A list of ``n`` entries."""
        found = self.get(key, kinds, default, is_list=True)
        if key in self.values and len(found) != n:
            raise ValueError(f"{key} has {len(found)} entries, the manifest has {n} ids")
        return found


def _check_sizes(entries: _Entries, architecture: str, decoder: Decoder, n_ids: int) -> None:
    """Compare all of them; where llama.cpp has a default, a key may be missing."""
    equal_parts = decoder.hidden_size // decoder.n_heads
    for name, key, expected, default in (
        ("hidden_size", "embedding_length", decoder.hidden_size, _MISSING),
        ("n_layers", "block_count", decoder.n_layers, _MISSING),
        ("n_heads", "attention.head_count", decoder.n_heads, _MISSING),
        ("n_kv_heads", "attention.head_count_kv", decoder.n_kv_heads, _MISSING),
        ("head_dim", "attention.key_length", decoder.head_dim, equal_parts),
        ("head_dim", "attention.value_length", decoder.head_dim, equal_parts),
        ("head_dim", "rope.dimension_count", decoder.head_dim, decoder.head_dim),
        ("ffn_size", "feed_forward_length", decoder.ffn_size, _MISSING),
        ("max_sequence_length", "context_length", decoder.max_sequence_length, _MISSING),
        ("vocabulary", "vocab_size", n_ids, n_ids),
    ):
        found = entries.whole(f"{architecture}.{key}", default)
        if found != expected:
            where = f" in {architecture}.{key}" if name == "head_dim" else ""
            raise ValueError(f"has {name} {found}{where}, the manifest says {expected}")
    if decoder.n_layers > MAX_LAYERS:
        raise ValueError(f"has n_layers {decoder.n_layers}, llama.cpp takes {MAX_LAYERS}")
    if decoder.n_heads % decoder.n_kv_heads:
        raise ValueError(
            f"has n_heads {decoder.n_heads}, not a multiple of n_kv_heads {decoder.n_kv_heads}"
        )
    if decoder.head_dim % 2:
        raise ValueError(f"has head_dim {decoder.head_dim}, which is odd")


def _check_numbers(entries: _Entries, architecture: str) -> None:
    epsilon = f"{architecture}.attention.layer_norm_rms_epsilon"
    base = f"{architecture}.rope.freq_base"
    for key, low, high, default in ((epsilon, 1e-30, 0.1, _MISSING), (base, 1.0, 1e12, 10_000.0)):
        value = entries.number(key, default)
        if not low <= value <= high:
            raise ValueError(f"{key} is {value:g}, expected one from {low:g} to {high:g}")
    for key, entry in entries.values.items():
        if entry.kind in (FLOAT32, FLOAT64) and not np.isfinite(entry.content).all():
            raise ValueError(f"{key} is not finite")


def _check_vocabulary(entries: _Entries, n_ids: int) -> None:
    model = entries.text("tokenizer.ggml.model")
    if model not in _VOCABULARIES:
        raise ValueError(f"tokenizer.ggml.model is {model[:60]!a}, none of those that are exported")
    tokens = entries.list_of("tokenizer.ggml.tokens", (TEXT,), n_ids)
    _check_texts("tokenizer.ggml.tokens", tokens)
    if len(set(tokens)) != n_ids:
        raise ValueError("tokenizer.ggml.tokens has the same token twice")
    types = entries.list_of("tokenizer.ggml.token_type", (INT32,), n_ids)
    if types.min() < 1 or types.max() > _MAX_TOKEN_TYPE:
        raise ValueError("tokenizer.ggml.token_type has a type that there is not")
    entries.list_of("tokenizer.ggml.scores", (FLOAT32,), n_ids, ())
    merges = entries.get("tokenizer.ggml.merges", (TEXT,), [], is_list=True)
    _check_texts("tokenizer.ggml.merges", merges)
    if any(b" " not in merge[1:-1] for merge in merges):
        raise ValueError("tokenizer.ggml.merges has an entry that is no pair")
    suppressed = entries.get("tokenizer.ggml.suppress_tokens", (INT32,), [], is_list=True)
    ids = [("tokenizer.ggml.suppress_tokens", int(token)) for token in suppressed]
    ids += [(key, entries.whole(key)) for key in entries.values if _TOKEN_ID.fullmatch(key)]
    for key, token in ids:
        if not 0 <= token < n_ids:
            raise ValueError(f"{key} names id {token}, the manifest has {n_ids}")
    for key in entries.values:
        if key.startswith("tokenizer.ggml.add_"):
            entries.get(key, (BOOL,), False)
    entries.text("tokenizer.chat_template", b"")


def _check_texts(key: str, texts: list[bytes]) -> None:
    """Not empty, without NUL, and UTF-8."""
    whole = b"\n".join(texts)
    if not all(texts) or b"\0" in whole:
        raise ValueError(f"{key} has an entry that is no text")
    try:
        whole.decode("utf-8")  # the line breaks keep characters from going on in the next entry
    except UnicodeDecodeError as error:
        raise ValueError(f"{key} has an entry that is not UTF-8") from error


def _check_tensors(tensors: Mapping[str, Tensor], decoder: Decoder, n_ids: int) -> None:
    table, norm = (decoder.hidden_size, n_ids), (decoder.hidden_size,)
    for name, expected in (
        ("token_embd.weight", table),
        ("output_norm.weight", norm),
        ("output.weight", table),
    ):
        shape = tensors[name].shape if name in tensors else None
        if shape is None and name == "output.weight":
            continue  # the token table serves
        if shape != expected:
            found = "x".join(map(str, shape)) if shape else "missing"
            raise ValueError(f"{name} is {found}, expected {'x'.join(map(str, expected))}")
    blocks = {int(index) for name in tensors if (index := _block(name)) is not None}
    if blocks != set(range(decoder.n_layers)):
        raise ValueError(
            f"has tensors of {len(blocks)} layers, the manifest says {decoder.n_layers}"
        )


def _block(name: str) -> int | None:
    match = re.match(r"blk\.([0-9]{1,9})\.", name)
    return int(match[1]) if match else None
