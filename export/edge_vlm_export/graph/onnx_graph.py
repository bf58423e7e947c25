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
OPSET_INT4 = 21  # the first with four-bit integers and scales of blocks
CONTRIB = "com.microsoft"  # onnxruntime's own operators
# Weights beyond this go to a second file, which onnxruntime maps into memory instead of parsing.
EXTERNAL_DATA_BYTES = 256 << 20
PAGE = 4096  # alignment of large weights in the second file, so that they can be mapped

Array = npt.NDArray[Any]
Load = Callable[[], Array]
Written = Callable[[int], None]  # told the number of bytes of each weight written


@dataclass(frozen=True)
class Weight:
    """One initializer; ``load`` returns its values in any type that ``kind`` can hold.

    ``kind`` is one of ``TensorProto``'s types. Four-bit integers are loaded as they are stored:
    a flat array of bytes with two of them each, the first one in the lower half.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    load: Load

    @property
    def n_bytes(self) -> int:
        """Size of the stored values."""
        n_values = math.prod(self.shape)
        return (
            (n_values + 1) // 2 if self.kind == TensorProto.INT4 else n_values * self.dtype.itemsize
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Numpy's type of a value."""
        dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(self.kind)
        return dtype

    def values(self) -> Array:
        """The values as they are stored.

        Raises:
            CheckpointError: a value is too large for half precision.
        """
        values = self.load()
        if self.kind == TensorProto.INT4:
            assert values.nbytes == self.n_bytes, self.name  # noqa: S101
            return values
        assert values.shape == self.shape, (self.name, values.shape, self.shape)  # noqa: S101
        if self.kind == TensorProto.FLOAT16:
            return to_half(values, self.name)
        return np.ascontiguousarray(values, self.dtype)

    def proto(self) -> onnx.TensorProto:
        """Without values."""
        return TensorProto(name=self.name, dims=self.shape, data_type=self.kind)

    def inline(self, written: Written) -> onnx.TensorProto:
        """With its values."""
        proto = self.proto()
        proto.raw_data = self.values().tobytes()
        written(self.n_bytes)
        return proto


class Graph:
    """Nodes, weights, inputs and outputs of a graph under construction."""

    def __init__(self, name: str, opset: int = OPSET) -> None:
        self.name = name
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Weight] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.marked: list[onnx.ValueInfoProto] = []

    @property
    def n_bytes(self) -> int:
        """Size of all weights."""
        return sum(weight.n_bytes for weight in self.weights.values())

    def op(
        self, kind: str, name: str, *inputs: str, domain: str | None = None, **attributes: Any
    ) -> str:
        """Add a node with one output, which carries the node's name."""
        self.ops(kind, [name], *inputs, name=name, domain=domain, **attributes)
        return name

    def ops(
        self,
        kind: str,
        outputs: Sequence[str],
        *inputs: str,
        name: str,
        domain: str | None = None,
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs; an empty input is one left out."""
        self.nodes.append(
            helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return list(outputs)

    def split(self, source: str, names: Sequence[str]) -> list[str]:
        """Cut the last axis into equal parts."""
        return self.ops(
            "Split", names, source, name=f"{source}.split", axis=-1, num_outputs=len(names)
        )

    def weight(
        self, name: str, shape: tuple[int, ...], load: Load, kind: int = TensorProto.FLOAT
    ) -> str:
        """Add a weight stored as ``kind``, one of ``TensorProto``'s types."""
        self.weights[name] = Weight(name, shape, kind, load)
        return name

    def half_weight(self, name: str, shape: tuple[int, ...], load: Load) -> str:
        """Add a weight stored in half precision and cast back before use."""
        stored = self.weight(f"{name}.fp16", shape, load, TensorProto.FLOAT16)
        return self.op("Cast", name, stored, to=TensorProto.FLOAT)

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Add a small constant: integers as int64, other numbers as float32."""
        array = np.asarray(value)
        kind = TensorProto.INT64 if array.dtype.kind == "i" else TensorProto.FLOAT
        return self.weight(name, array.shape, lambda: array, kind)

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """Declare an input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str] | None) -> None:
        """Declare a float32 value to be an output; without a shape if that is of no interest."""
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
            initializers = [weight.inline(written) for weight in self.weights.values()]
        with path.open("wb") as file:
            file.write(self._model(initializers, producer))
        return files

    def in_memory(self) -> bytes:
        """The model with all weights in it, for a session that needs no file."""
        weights = [weight.inline(lambda n_bytes: None) for weight in self.weights.values()]
        return self._model(weights, producer="")

    def _model(self, initializers: Sequence[onnx.TensorProto], producer: str) -> bytes:
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, initializers, value_info=self.marked
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if any(node.domain == CONTRIB for node in self.nodes):
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets[:1]),
            producer_name=producer,
        )
        serialized: bytes = model.SerializeToString(deterministic=True)
        return serialized

    def _write_external(self, path: Path, written: Written) -> list[onnx.TensorProto]:
        initializers = []
        with path.open("wb") as file:
            for weight in self.weights.values():
                if weight.n_bytes < PAGE:
                    initializers.append(weight.inline(written))
                    continue
                file.write(bytes(-file.tell() % PAGE))
                proto = weight.proto()
                proto.data_location = TensorProto.EXTERNAL
                place = {"location": path.name, "offset": file.tell(), "length": weight.n_bytes}
                for key, value in place.items():
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
