"""A small ONNX graph writer: nodes are named by their output, weights are read when written.

Weights are functions that return an array, called one at a time while the file is written, so the
memory needed is that of the largest tensor. Beyond a size the weights go to a second file (ONNX
"external data"), because a protobuf message may not exceed 2 GB and is held in memory as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edge_vlm.errors import CheckpointError

OPSET = 20  # the first with Gelu and its tanh form
# Weights beyond this go to a second file, which onnxruntime maps into memory instead of parsing.
EXTERNAL_DATA_BYTES = 256 << 20
PAGE = 4096  # alignment of large weights in the second file, so that they can be mapped

Array = npt.NDArray[Any]
Load = Callable[[], Array]
Written = Callable[[int], None]  # told the number of bytes of each weight written

_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
}


@dataclass(frozen=True)
class Weight:
    """One initializer; ``load`` returns its values in any float type."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Load

    @property
    def n_bytes(self) -> int:
        """Size of the stored values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def values(self) -> Array:
        """The values as they are stored.

        Raises:
            CheckpointError: a value is too large for half precision.
        """
        values = self.load()
        assert values.shape == self.shape, (self.name, values.shape, self.shape)  # noqa: S101
        if self.dtype == np.float16:
            return to_half(values, self.name)
        return np.ascontiguousarray(values, self.dtype)


class Graph:
    """Nodes, weights, inputs and outputs of a graph under construction."""

    def __init__(self, name: str, half_weights: bool) -> None:
        self.name = name
        self.half_weights = half_weights
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Weight] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.marked: list[onnx.ValueInfoProto] = []

    @property
    def n_bytes(self) -> int:
        """Size of all weights."""
        return sum(weight.n_bytes for weight in self.weights.values())

    def op(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output, which carries the node's name."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def split(self, source: str, names: Sequence[str]) -> list[str]:
        """Cut the last axis into equal parts."""
        self.nodes.append(
            helper.make_node(
                "Split", [source], names, name=f"{source}.split", axis=-1, num_outputs=len(names)
            )
        )
        return list(names)

    def weight(self, name: str, shape: tuple[int, ...], load: Load, exact: bool = False) -> str:
        """Add a float weight; with half precision, matrices are stored so unless ``exact``.

        They are cast back before use, so the arithmetic is that of float32.
        """
        half = self.half_weights and len(shape) > 1 and not exact
        if not half:
            self.weights[name] = Weight(name, shape, np.dtype(np.float32), load)
            return name
        stored = f"{name}.fp16"
        self.weights[stored] = Weight(stored, shape, np.dtype(np.float16), load)
        return self.op("Cast", name, stored, to=TensorProto.FLOAT)

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Add a small constant: integers as int64, other numbers as float32."""
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        self.weights[name] = Weight(name, array.shape, array.dtype, lambda: array)
        return name

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """Declare an input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Declare a float32 value to be an output."""
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def mark(self, name: str, shape: Sequence[int | str]) -> str:
        """Record the shape of an inner float32 value, for tools that want to look at it."""
        self.marked.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def save(self, path: Path, external_bytes: int, written: Written, producer: str) -> list[Path]:
        """Write the model; returns the files written.

        Weights go to ``<path>.data`` when together they are larger than ``external_bytes``.
        """
        files = [path]
        if self.n_bytes > external_bytes:
            files.append(path.with_name(path.name + ".data"))
            initializers = self._write_external(files[1], written)
        else:
            initializers = [_inline(weight, written) for weight in self.weights.values()]
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, initializers, value_info=self.marked
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name=producer,
        )
        with path.open("wb") as file:
            file.write(model.SerializeToString(deterministic=True))
        return files

    def _write_external(self, path: Path, written: Written) -> list[onnx.TensorProto]:
        initializers = []
        with path.open("wb") as file:
            for weight in self.weights.values():
                if weight.n_bytes < PAGE:
                    initializers.append(_inline(weight, written))
                    continue
                file.write(bytes(-file.tell() % PAGE))
                proto = _proto(weight)
                proto.data_location = TensorProto.EXTERNAL
                for key, value in (
                    ("location", path.name),
                    ("offset", file.tell()),
                    ("length", weight.n_bytes),
                ):
                    proto.external_data.add(key=key, value=str(value))
                file.write(weight.values().data)
                initializers.append(proto)
                written(weight.n_bytes)
        return initializers


def to_half(values: Array, name: str) -> npt.NDArray[np.float16]:
    """Round to half precision.

    Raises:
        CheckpointError: a value is too large for it.
    """
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(values, np.float16)
    if not np.isfinite(half).all():
        raise CheckpointError(
            f"tensor {name} has values beyond half precision's 65504; export it in fp32"
        )
    return half


def _proto(weight: Weight) -> onnx.TensorProto:
    return TensorProto(name=weight.name, dims=weight.shape, data_type=_TYPES[weight.dtype])


def _inline(weight: Weight, written: Written) -> onnx.TensorProto:
    proto = _proto(weight)
    proto.raw_data = weight.values().tobytes()
    written(weight.n_bytes)
    return proto
