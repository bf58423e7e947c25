"""Matrix products of the vision graph in every precision and layout.

``cpu`` uses onnxruntime's operators (domain com.microsoft), ``portable`` those of the ONNX
standard. Integer activations are uint8 against int8 weights on the CPU: the pair for which
onnxruntime has fast kernels on x86 and ARM alike; int8 against int8 is slower than float32 on x86.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from edge_vlm_export.graph import integers
from edge_vlm_export.graph.onnx_graph import CONTRIB, Graph
from edge_vlm_export.graph.precision import WEIGHTS_ONLY_INT8, Recipe

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32
    from edge_vlm_export.graph.architecture import Linear

INT4_BLOCK = 32
INT8_BLOCK = 128  # for weights alone; larger blocks are not faster
# MatMulNBits may round activations to eight bits block by block: several times faster on ARM.
_ACCURACY_INT8 = 4

Array = npt.NDArray[Any]
Rounding = Callable[["Float32"], "tuple[Array, Float32]"]


class Products:
    """Adds products to a graph: x @ weight.T + bias, with the checkpoint's weights."""

    def __init__(
        self, graph: Graph, linears: Mapping[str, Linear], tensors: Checkpoint, recipe: Recipe
    ) -> None:
        self.graph = graph
        self.linears = linears
        self.tensors = tensors
        self.recipe = recipe
        self.inputs: dict[str, str] = {}  # product -> the value it reads
        self._latest: tuple[str, Any] = ("", None)

    def __call__(self, name: str, x: str) -> str:
        """Add the product ``name``."""
        self.inputs[name] = x
        precision, portable = self.recipe.of(name), self.recipe.target == "portable"
        if precision == "int8":
            return (self._dynamic_standard if portable else self._dynamic)(name, x)
        if precision == "int8-static":
            if portable:
                return self._static_standard(name, x)
            return self._integer_product(name, self._quantized_input(name, x), f"{name}.product")
        if precision in ("int4", WEIGHTS_ONLY_INT8) and not portable:
            return self._blocks(name, x, bits=4 if precision == "int4" else 8)
        if precision == "int4" and (block := _standard_block(self._shape(name)[1])):
            weight = self._int4_standard(name, block)
        elif precision in ("int4", WEIGHTS_ONLY_INT8):
            weight = self._int8_standard(name)
        else:
            out_size, in_size = self._shape(name)
            store = self.graph.half_weight if precision == "fp16" else self.graph.weight
            weight = store(f"{name}.weight_t", (in_size, out_size), lambda: self._matrix(name).T)
        product = self.graph.op("MatMul", f"{name}.product", x, weight)
        return self._add_bias(name, product)

    def parts(self, name: str, x: str, outputs: Sequence[str]) -> list[str]:
        """The product cut into equal parts along the last axis.

        Integer products on the CPU are cut in their weights: the input is rounded once, and no
        float32 value is copied.
        """
        if self.recipe.target == "portable" or self.recipe.of(name) not in ("int8", "int8-static"):
            return self.graph.split(self(name, x), outputs)
        self.inputs[name] = x
        quantized = self._quantized_input(name, x)
        n_parts = len(outputs)
        return [
            self._integer_product(name, quantized, output, (index, n_parts))
            for index, output in enumerate(outputs)
        ]

    def _dynamic(self, name: str, x: str) -> str:
        """The input's range is taken anew in each run, one scale for all of it."""
        bias = self._bias(name)
        inputs = x, *self._int8(name), *_behind(1, bias)
        return self.graph.op("DynamicQuantizeMatMul", f"{name}.product", *inputs, domain=CONTRIB)

    def _quantized_input(self, name: str, x: str) -> tuple[str, str, str]:
        """The input as uint8, its scale and its zero point."""
        g = self.graph
        if self.recipe.of(name) == "int8":
            outputs = [f"{name}.{part}" for part in ("x", "x_scale", "x_zero")]
            quantized, scale, zero = g.ops("DynamicQuantizeLinear", outputs, x, name=f"{name}.x")
        else:
            scale, zero = self._input_scale(name, *self.recipe.ranges[name].unsigned())
            quantized = g.op("QuantizeLinear", f"{name}.x", x, scale, zero)
        return quantized, scale, zero

    def _integer_product(
        self, name: str, x: tuple[str, str, str], output: str, part: tuple[int, int] = (0, 1)
    ) -> str:
        quantized, x_scale, x_zero = x
        weight, scale = self._int8(name, part)
        inputs = quantized, weight, x_scale, scale, x_zero, *_behind(1, self._bias(name, part))
        return self.graph.op("MatMulIntegerToFloat", output, *inputs, domain=CONTRIB)

    def _dynamic_standard(self, name: str, x: str) -> str:
        g = self.graph
        weight, scale = self._int8(name)
        quantized, x_scale, x_zero = self._quantized_input(name, x)
        total = g.op("MatMulInteger", f"{name}.integers", quantized, weight, x_zero)
        total = g.op("Cast", f"{name}.floats", total, to=TensorProto.FLOAT)
        scale = g.op("Mul", f"{name}.scales", x_scale, scale)
        return self._add_bias(name, g.op("Mul", f"{name}.product", total, scale))

    def _static_standard(self, name: str, x: str) -> str:
        g = self.graph
        scales = self._input_scale(name, *self.recipe.ranges[name].signed())
        x = g.op("QuantizeLinear", f"{name}.x", x, *scales)
        x = g.op("DequantizeLinear", f"{name}.x.dequantized", x, *scales)
        product = g.op("MatMul", f"{name}.product", x, self._int8_standard(name))
        return self._add_bias(name, product)

    def _int8_standard(self, name: str) -> str:
        return self.graph.op("DequantizeLinear", f"{name}.weight", *self._int8(name), axis=1)

    def _int4_standard(self, name: str, block: int) -> str:
        g = self.graph
        out_size, in_size = self._shape(name)
        make = self._int4(name, block)

        def values() -> Array:
            return integers.pack_nibbles(make()[0].reshape(out_size, in_size).T.reshape(-1))

        return g.op(
            "DequantizeLinear",
            f"{name}.weight",
            g.weight(f"{name}.int4", (in_size, out_size), values, TensorProto.INT4),
            g.weight(f"{name}.scale", (in_size // block, out_size), lambda: make()[1].T),
            axis=0,
            block_size=block,
        )

    def _blocks(self, name: str, x: str, bits: int) -> str:
        """Weights in blocks with a scale each; the arithmetic is that of the activations."""
        g = self.graph
        out_size, in_size = self._shape(name)
        block = INT4_BLOCK if bits == 4 else INT8_BLOCK
        n_blocks = -(-in_size // block)
        if bits == 4:
            made = self._int4(name, block)
        else:
            made = self._rounded(name, lambda weight: integers.int8_blocks(weight, block))

        def values() -> Array:
            if bits == 4:
                return integers.pack_nibbles(made()[0] + 8)
            return (made()[0].astype(np.int16) + 128).astype(np.uint8)

        weight = g.weight(
            f"{name}.int{bits}", (out_size, n_blocks, block * bits // 8), values, TensorProto.UINT8
        )
        scale = g.weight(f"{name}.scale", (out_size, n_blocks), lambda: made()[1])
        bias = self._bias(name)
        return g.op(
            "MatMulNBits",
            f"{name}.product",
            *(x, weight, scale, *_behind(2, bias)),
            domain=CONTRIB,
            K=in_size,
            N=out_size,
            bits=bits,
            block_size=block,
            accuracy_level=_ACCURACY_INT8,
        )

    def _int8(self, name: str, part: tuple[int, int] = (0, 1)) -> tuple[str, str]:
        """Names of the weight (in, out) in int8 and of its scales (out,), or of a part of both."""
        out_size, in_size = self._shape(name)
        rows, label = _rows(out_size, part)
        n_rows, made = out_size // part[1], self._rounded(name, integers.int8_channels)
        store = self.graph.weight
        return (
            store(
                f"{name}{label}.int8",
                (in_size, n_rows),
                lambda: made()[0][rows].T,
                TensorProto.INT8,
            ),
            store(f"{name}{label}.scale", (n_rows,), lambda: made()[1][rows]),
        )

    def _rounded(self, name: str, rounding: Rounding) -> Callable[[], tuple[Array, Float32]]:
        """Integers and scales, which are written one after the other: one product's are held."""

        def made() -> tuple[Array, Float32]:
            if self._latest[0] != name:
                self._latest = ("", None)
                self._latest = (name, rounding(self._matrix(name)))
            found: tuple[Array, Float32] = self._latest[1]
            return found

        return made

    def _int4(self, name: str, block: int) -> Callable[[], tuple[Array, Float32]]:
        importance = self.recipe.importance.get(name)
        return self._rounded(name, lambda weight: integers.int4_blocks(weight, block, importance))

    def _input_scale(self, name: str, scale: np.float32, zero: np.integer[Any]) -> tuple[str, str]:
        kind = TensorProto.UINT8 if isinstance(zero, np.uint8) else TensorProto.INT8
        return (
            self.graph.constant(f"{name}.x_scale", scale),
            self.graph.weight(f"{name}.x_zero", (), lambda: np.asarray(zero), kind),
        )

    def _add_bias(self, name: str, product: str) -> str:
        bias = self._bias(name)
        return self.graph.op("Add", f"{name}.sum", product, *bias) if bias else product

    def _bias(self, name: str, part: tuple[int, int] = (0, 1)) -> list[str]:
        """The bias or a part of it; none if the product has none."""
        linear = self.linears[name]
        if not linear.biases:
            return []
        rows, label = _rows(linear.n_out, part)

        def load() -> Float32:
            return self.recipe.vector(linear.bias(self.tensors), name)[rows]

        return [self.graph.weight(f"{name}{label}.bias", (linear.n_out // part[1],), load)]

    def _shape(self, name: str) -> tuple[int, int]:
        return self.linears[name].n_out, self.linears[name].n_in

    def _matrix(self, name: str) -> Float32:
        return self.recipe.matrix(name, self.linears[name].weight(self.tensors))


def _rows(out_size: int, part: tuple[int, int]) -> tuple[slice, str]:
    """Rows of a weight that part (index, number of parts) has, and what its name ends with."""
    index, n_parts = part
    n_rows = out_size // n_parts
    return slice(index * n_rows, (index + 1) * n_rows), f".{index}" if n_parts > 1 else ""


def _behind(n_left_out: int, bias: list[str]) -> list[str]:
    """A bias as the input behind some that are left out."""
    return [""] * n_left_out + bias if bias else []


def _standard_block(in_size: int) -> int | None:
    """A block that divides the inputs, as engines other than onnxruntime ask for."""
    return next((block for block in (INT4_BLOCK, INT4_BLOCK // 2) if in_size % block == 0), None)
