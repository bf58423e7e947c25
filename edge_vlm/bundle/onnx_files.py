"""Which files an ONNX file would make onnxruntime read.

A tensor of an ONNX model may live in another file, named by a path inside the model. Before
onnxruntime opens a bundle's graph, every such path is collected here and compared with the
manifest, so that a model cannot read files outside its bundle. Only the protobuf wire format is
walked (https://protobuf.dev/programming-guides/encoding/), with the field numbers of onnx.proto3;
importing ``onnx`` for it would cost the runtime a large dependency.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from edge_vlm.errors import BundleError

# Message type -> field number -> message type inside. Only what can lead to a TensorProto.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_MAX_DEPTH = 64
_MAX_FIELDS = 1_000_000  # walked in about a second; the released model has fewer than 100,000
_MAX_ENTRY_BYTES = 4096  # of a path, and of its key
_VARINT, _BYTES = 0, 2  # wire types
_FIXED = {1: 8, 5: 4}  # those of a fixed number of bytes


def external_files(path: Path) -> set[str]:
    """The external data locations named anywhere in an ONNX file.

    Raises:
        BundleError: the file is not a well-formed protobuf message.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_Walk(data).locations(0, len(data), "model", 0))
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: is not a valid ONNX file ({error})") from error


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._n_fields = 0

    def locations(self, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
        """The locations named inside a message of type ``kind``."""
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        for field, begin, stop in self._fields(start, end):
            inner = _FIELDS[kind].get(field)
            if inner == "entry":
                yield from self._location(begin, stop)
            elif inner is not None:
                yield from self.locations(begin, stop, inner, depth + 1)

    def _location(self, start: int, end: int) -> Iterator[str]:
        if end - start > _MAX_ENTRY_BYTES:
            raise ValueError("an external data entry is too long")
        entry = {field: self._data[begin:stop] for field, begin, stop in self._fields(start, end)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode("utf-8")

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(field number, begin, end) of each length-delimited field of a message."""
        position = start
        while position < end:
            self._n_fields += 1
            if self._n_fields > _MAX_FIELDS:
                raise ValueError(f"more than {_MAX_FIELDS} fields")
            key, position = _varint(self._data, position, end)
            wire = key & 7
            if wire == _VARINT:
                _, position = _varint(self._data, position, end)
            elif wire in _FIXED:
                position += _FIXED[wire]
            elif wire == _BYTES:
                length, position = _varint(self._data, position, end)
                if length > end - position:
                    raise ValueError("a field is longer than its message")
                yield key >> 3, position, position + length
                position += length
            else:
                raise ValueError(f"unknown wire type {wire}")
        if position > end:
            raise ValueError("a field is longer than its message")


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise ValueError("ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is too long")
