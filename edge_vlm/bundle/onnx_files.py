"""What an ONNX file would make onnxruntime read and run.

A tensor of an ONNX model may live in another file, named by a path inside the model. Before
onnxruntime opens a bundle's graph, every such path is collected here and compared with the
manifest, so that a model cannot read files outside its bundle; so are its operators, none of which
may be a loop, a branch or one that is defined in the file. Only the protobuf wire format is walked
(https://protobuf.dev/programming-guides/encoding/), with the field numbers of onnx.proto3;
importing ``onnx`` for it would cost the runtime a large dependency. Numbers that protobuf's readers
would cut or refuse are refused, so that what is read is what was looked at.
"""

from __future__ import annotations

import mmap
from collections.abc import Container, Iterator
from pathlib import Path

from edge_vlm.errors import BundleError, label

STANDARD = ("", "ai.onnx")
# What the exporter writes, and plain arithmetic and moves of values besides.
_STANDARD_OPERATORS = """
    Add And Cast Concat Constant DequantizeLinear Div DynamicQuantizeLinear Equal Gather Gelu
    Identity LayerNormalization MatMul MatMulInteger Mul Not Pad QuantizeLinear ReduceMax ReduceMean
    ReduceMin ReduceSum Reshape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Transpose Unsqueeze
"""
# Of onnxruntime's own.
_OWN_OPERATORS = """
    DynamicQuantizeMatMul FastGelu MatMulIntegerToFloat MatMulNBits MultiHeadAttention QuickGelu
"""
OPERATORS = frozenset(
    {(domain, name) for domain in STANDARD for name in _STANDARD_OPERATORS.split()}
    | {("com.microsoft", name) for name in _OWN_OPERATORS.split()}
)

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
_OP_TYPE, _DOMAIN = 4, 7  # of a node
_MAX_NAME_BYTES = 200  # of both
# What a bundle's graph never has, by message and the kind inside.
_REFUSED = {
    ("model", "training"): "a training graph",
    ("model", "function"): "a function of its own",
    ("attribute", "graph"): "a loop or a branch",
    ("graph", "sparse"): "a sparse tensor",
    ("attribute", "sparse"): "a sparse tensor",
}
_MAX_DEPTH = 64
_MAX_FIELDS = 1_000_000  # walked in about a second; the released model has fewer than 100,000
_MAX_ENTRY_BYTES = 4096  # of a path, and of its key
_MAX_TAG, _MAX_LENGTH = (1 << 32) - 1, (1 << 31) - 1  # of protobuf
_VARINT, _BYTES = 0, 2  # wire types
_FIXED = {1: 8, 5: 4}  # those of a fixed number of bytes


def external_files(path: Path) -> set[str]:
    """The external data locations named anywhere in an ONNX file.

    Raises:
        BundleError: the file is not a well-formed protobuf message.
    """
    return _walk(path).locations


def check_graph(path: Path, listed: Container[str], more: Container[str] = ()) -> None:
    """Check what onnxruntime would read and run.

    Args:
        path: the ONNX file.
        listed: names of the files that it may read.
        more: names of standard operators that it may have besides ``OPERATORS``.

    Raises:
        BundleError: the file is not well-formed, names another file, or computes in a way that no
            exported graph does.
    """
    found = _walk(path)
    for name in sorted(found.locations):
        if name not in listed:
            raise BundleError(f"{label(path)}: reads {name!r}, which is not a file of the bundle")
    for part in sorted(found.refused):
        raise BundleError(f"{label(path)}: has {part}, which no vision tower needs")
    for domain, name in sorted(found.operators - OPERATORS):
        if domain not in STANDARD or name not in more:
            operator = ascii(f"{domain}.{name}" if domain else name)
            raise BundleError(f"{label(path)}: has the operator {operator}, which is not allowed")


def _walk(path: Path) -> _Walk:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk = _Walk(data)
            walk.message(0, len(data), "model", 0)
            return walk
    except (OSError, ValueError) as error:
        raise BundleError(f"{label(path)}: is not a valid ONNX file ({error})") from error


class _Walk:
    """Everything in a file that matters here."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._n_fields = 0
        self.locations: set[str] = set()
        self.operators: set[tuple[str, str]] = set()  # (domain, name)
        self.refused: set[str] = set()

    def message(self, start: int, end: int, kind: str, depth: int) -> None:
        """Walk a message of type ``kind``."""
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        names: dict[int, set[str]] = {_OP_TYPE: set(), _DOMAIN: set()}
        for field, begin, stop in self._fields(start, end):
            inner = _FIELDS[kind].get(field)
            if inner == "entry":
                self._location(begin, stop)
            elif inner is not None:
                if (kind, inner) in _REFUSED:
                    self.refused.add(_REFUSED[kind, inner])
                self.message(begin, stop, inner, depth + 1)
            elif kind == "node" and field in names:
                if stop - begin > _MAX_NAME_BYTES:
                    raise ValueError("an operator's name is too long")
                names[field].add(self._data[begin:stop].decode("utf-8"))
        if kind == "node":  # a name that is written twice counts twice
            domains, types = names[_DOMAIN] or {""}, names[_OP_TYPE] or {""}
            self.operators |= {(domain, name) for domain in domains for name in types}

    def _location(self, start: int, end: int) -> None:
        if end - start > _MAX_ENTRY_BYTES:
            raise ValueError("an external data entry is too long")
        entry = {field: self._data[begin:stop] for field, begin, stop in self._fields(start, end)}
        if entry.get(1) == b"location":
            self.locations.add(entry.get(2, b"").decode("utf-8"))

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(field number, begin, end) of each length-delimited field of a message."""
        position = start
        while position < end:
            self._n_fields += 1
            if self._n_fields > _MAX_FIELDS:
                raise ValueError(f"more than {_MAX_FIELDS} fields")
            key, position = _varint(self._data, position, end, _MAX_TAG)
            if key < 8:
                raise ValueError("a field has no number")
            wire = key & 7
            if wire == _VARINT:
                _, position = _varint(self._data, position, end)
            elif wire in _FIXED:
                position += _FIXED[wire]
            elif wire == _BYTES:
                length, position = _varint(self._data, position, end, _MAX_LENGTH)
                if length > end - position:
                    raise ValueError("a field is longer than its message")
                yield key >> 3, position, position + length
                position += length
            else:
                raise ValueError(f"unknown wire type {wire}")
        if position > end:
            raise ValueError("a field is longer than its message")


def _varint(
    data: mmap.mmap, position: int, end: int, highest: int = (1 << 64) - 1
) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise ValueError("ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > highest or (shift and not byte):
                break  # protobuf's readers differ on what they make of these
            return value, position
    raise ValueError("a number is too large or too long")
