"""The header of a GGUF: keys with values, and where each tensor lies.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Everything is bounded, so that a file of
a stranger costs a second at most and ends in an error. The ``gguf`` package sets no such bounds and
is the exporter's alone.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_HEADER_BYTES = 256 << 20  # one of 150,000 tokens has 6 MB
MAX_KEYS = 4096
MAX_TENSORS = 1 << 16
MAX_TEXTS = 1 << 21  # of a list
MAX_TEXT_BYTES = 1 << 20
MAX_ALIGNMENT = 1 << 16

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NAME = re.compile(rb"[A-Za-z0-9_.\-]{1,63}")  # of a tensor; llama.cpp's limit
_KEY = re.compile(rb"[A-Za-z0-9_.\-]{1,255}")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# Type number -> how it is stored; text and lists aside.
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
TEXT, _LIST = 8, 9
UINT32, INT32, FLOAT32, FLOAT64, BOOL = 4, 5, 6, 12, 7
# Tensor type -> values in a block, and its bytes.
_BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    20: (32, 18),  # IQ4_NL
    23: (256, 136),  # IQ4_XS
    30: (1, 2),  # BF16
}
_F32 = 0


@dataclass(frozen=True)
class Value:
    """One entry: ``content`` is a number, bytes of text, a list of those, or an array."""

    kind: int  # GGUF's number of the type, of a list that of its members
    is_list: bool
    content: Any


@dataclass(frozen=True)
class Tensor:
    """One tensor's place."""

    shape: tuple[int, ...]  # the fastest axis first
    kind: int
    start: int  # bytes from where tensors begin
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """Everything in front of the tensors, and their places."""

    values: Mapping[str, Value]
    tensors: Mapping[str, Tensor]


def read_header(data: bytes | mmap.mmap) -> Header:
    """The header of a whole file's bytes.

    Raises:
        ValueError: malformed, or beyond the bounds.
    """
    return _Reader(data).header()


class _Reader:
    """Walks the bytes of a file once."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._data = data
        self._n = len(data)
        self._end = min(self._n, MAX_HEADER_BYTES)
        self._at = 0

    def header(self) -> Header:
        """All of it."""
        if self._bytes(4) != _MAGIC:
            raise ValueError("is not a GGUF file")
        version = self._number(_U32)
        if version not in _VERSIONS:
            raise ValueError(f"has GGUF version {version}, expected {_VERSIONS[-1]}")
        n_tensors, n_keys = self._number(_U64), self._number(_U64)
        if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
            raise ValueError(f"lists {n_tensors} tensors and {n_keys} keys, which is too many")
        values: dict[str, Value] = {}
        for _ in range(n_keys):
            key = self._name(_KEY, "a key")
            if key in values:
                raise ValueError(f"has the key {key} twice")
            values[key] = self._value(key)
        alignment = _alignment(values)
        tensors: dict[str, Tensor] = {}
        end = 0
        for _ in range(n_tensors):
            name = self._name(_NAME, "a tensor's name")
            if name in tensors:
                raise ValueError(f"has the tensor {name} twice")
            tensors[name] = tensor = self._tensor(name)
            if tensor.start != end:
                raise ValueError(f"tensor {name} begins at {tensor.start}, expected {end}")
            end += -(-tensor.n_bytes // alignment) * alignment
        begin = -(-self._at // alignment) * alignment
        for name, tensor in tensors.items():
            if begin + tensor.start + tensor.n_bytes > self._n:
                raise ValueError(f"ends inside the tensor {name}")
        return Header(values, tensors)

    def _bytes(self, n: int) -> bytes:
        start = self._at
        if n > self._end - start:
            raise ValueError("its header ends early, or is too long")
        self._at = start + n
        return self._data[start : start + n]

    def _number(self, form: struct.Struct) -> Any:
        return form.unpack(self._bytes(form.size))[0]

    def _name(self, pattern: re.Pattern[bytes], what: str) -> str:
        length = self._number(_U64)
        text = self._bytes(length) if length <= 255 else b""
        if not pattern.fullmatch(text):
            raise ValueError(f"{what} is malformed: {text[:40]!r}, {length} bytes")
        return text.decode("ascii")

    def _value(self, key: str) -> Value:
        kind = self._number(_U32)
        if kind == TEXT:
            return Value(kind, False, self._texts(1, key)[0])
        if kind != _LIST:
            return Value(kind, False, self._number(_scalar(kind, key)))
        kind, count = self._number(_U32), self._number(_U64)
        if kind == TEXT:
            return Value(kind, True, self._texts(count, key))
        form = _scalar(kind, key)
        return Value(
            kind, True, np.frombuffer(self._bytes(count * form.size), np.dtype(form.format))
        )

    def _texts(self, count: int, key: str) -> list[bytes]:
        if count > MAX_TEXTS:
            raise ValueError(f"{key} has {count} entries, which is too many")
        data, at, end, unpack = self._data, self._at, self._end, _U64.unpack_from
        found = []
        for _ in range(count):
            if end - at < 8:
                raise ValueError(f"its header ends early, in {key}")
            (length,) = unpack(data, at)
            at += 8
            if length > end - at or length > MAX_TEXT_BYTES:
                raise ValueError(f"{key} has a text of {length} bytes, which is too long")
            found.append(data[at : at + length])
            at += length
        self._at = at
        return found

    def _tensor(self, name: str) -> Tensor:
        n_axes = self._number(_U32)
        if not 1 <= n_axes <= 4:
            raise ValueError(f"tensor {name} has {n_axes} axes")
        shape = tuple(self._number(_U64) for _ in range(n_axes))
        kind, start = self._number(_U32), self._number(_U64)
        if kind not in _BLOCKS:
            raise ValueError(f"tensor {name} is of type {kind}, which decoders here do not have")
        n_values, n_bytes = _BLOCKS[kind]
        if not all(shape) or math.prod(shape) >= 1 << 44 or shape[0] % n_values:
            raise ValueError(f"tensor {name} has the shape {'x'.join(map(str, shape))}")
        if n_axes == 1 and kind != _F32:
            raise ValueError(f"tensor {name} is a vector that is not stored as F32")
        return Tensor(shape, kind, start, math.prod(shape) // n_values * n_bytes)


def _scalar(kind: int, key: str) -> struct.Struct:
    if kind not in _SCALARS:
        raise ValueError(f"{key} is of type {kind}, which there is not")
    return _SCALARS[kind]


def _alignment(values: Mapping[str, Value]) -> int:
    value = values.get("general.alignment", Value(UINT32, False, 32))
    n = value.content
    if value.kind != UINT32 or value.is_list or not 1 <= n <= MAX_ALIGNMENT or n & (n - 1):
        raise ValueError(f"general.alignment is no power of two up to {MAX_ALIGNMENT}")
    return int(n)
