"""GGUF files with a changed header."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edge_vlm.bundle.gguf_header import TEXT, Tensor, Value, read_header

_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LIST = 9
Entries = dict[str, Value]


def changed(
    good: bytes,
    change: Callable[[Entries], Any] = lambda _: None,
    *,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda _: None,
) -> bytes:
    """The file with entries or places of tensors that are changed in place."""
    header = read_header(good)
    n_data = sum(-(-tensor.n_bytes // 32) * 32 for tensor in header.tensors.values())
    values, places = dict(header.values), dict(header.tensors)
    change(values)
    tensors(places)
    return written(values, places) + good[len(good) - n_data :]


def written(values: Mapping[str, Value], tensors: Mapping[str, Tensor]) -> bytes:
    """A header, with what aligns the data behind it."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, value in values.items():
        parts += [_text(key.encode()), *_value(value)]
    for name, tensor in tensors.items():
        parts += [_text(name.encode()), struct.pack("<I", len(tensor.shape))]
        parts += [struct.pack("<Q", size) for size in tensor.shape]
        parts.append(struct.pack("<IQ", tensor.kind, tensor.start))
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % 32)


def _value(value: Value) -> list[bytes]:
    contents = value.content if value.is_list else [value.content]
    kinds = [_LIST, value.kind] if value.is_list else [value.kind]
    found = [struct.pack("<I", kind) for kind in kinds]
    if value.is_list:
        found.append(struct.pack("<Q", len(contents)))
    if value.kind == TEXT:
        return [*found, *map(_text, contents)]
    if isinstance(contents, np.ndarray):
        return [*found, contents.tobytes()]
    return [*found, struct.pack(f"<{len(contents)}{_FORMS[value.kind]}", *contents)]


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text
