"""Pieces that vision towers are put together from, in the layout and precision of a recipe.

``cpu`` uses operators that onnxruntime adds to the standard, ``portable`` those of the standard
alone (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md). Sums of
products run in float32 or in int32, never in fp16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from edge_vlm_export.graph.onnx_graph import CONTRIB, OPSET, OPSET_INT4, Graph
from edge_vlm_export.graph.products import Products

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32, Values
    from edge_vlm_export.graph.architecture import Activation, AttentionSizes, Axes, Linear
    from edge_vlm_export.graph.precision import Recipe

_QUICK = 1.702  # quick_gelu(x) = x * sigmoid(1.702 x)


class Layers:
    """A graph under construction; values are (n_crops, rows, channels) unless told otherwise."""

    def __init__(self, linears: Mapping[str, Linear], tensors: Checkpoint, recipe: Recipe) -> None:
        portable_int4 = recipe.precision == "int4" and recipe.target == "portable"
        self.graph = Graph("vision", OPSET_INT4 if portable_int4 else OPSET)
        self.tensors = tensors
        self.recipe = recipe
        self.linear = Products(self.graph, linears, tensors, recipe)
        self.n_crops: int | str = "n_crops" if recipe.batch is None else recipe.batch
        self._shared: set[str] = set()

    @property
    def on_cpu(self) -> bool:
        """Whether onnxruntime's own operators may be used."""
        return self.recipe.target == "cpu"

    def once(self, name: str, make: Callable[[str], str]) -> str:
        """A value that several parts of a graph read; ``make`` adds it under that name."""
        if name not in self._shared:
            self._shared.add(name)
            make(name)
        return name

    def input(self, name: str, shape: Axes, kind: int = TensorProto.FLOAT) -> str:
        """Declare an input with ``shape`` for one crop."""
        return self.graph.input(name, kind, (self.n_crops, *shape))

    def norm(self, name: str, x: str, tensor: str, eps: float) -> str:
        """LayerNorm with weight and bias; channels of its output may be moved."""
        parts = []
        for part in ("weight", "bias"):
            values = self.tensors.values(f"{tensor}.{part}")
            load = partial(self._moved, values, name)
            parts.append(self.graph.weight(f"{name}.{part}", values.shape, load))
        return self.graph.op("LayerNormalization", name, x, *parts, axis=-1, epsilon=eps)

    def rms_norm(self, name: str, x: str, tensor: str, eps: float) -> str:
        """RMSNorm; onnxruntime makes one operator of these."""
        g, values = self.graph, self.tensors.values(f"{tensor}.weight")
        square = g.op("Pow", f"{name}.square", x, g.constant("two", 2.0))
        mean = g.op("ReduceMean", f"{name}.mean", square, self.ints(-1), keepdims=1)
        mean = g.op("Add", f"{name}.least", mean, g.constant(f"eps_{eps:g}", eps))
        size = g.op("Sqrt", f"{name}.size", mean)
        normed = g.op("Div", f"{name}.normed", x, size)
        load = partial(self._moved, values, name)
        return g.op("Mul", name, normed, g.weight(f"{name}.weight", values.shape, load))

    def activation(self, name: str, x: str, kind: Activation) -> str:
        """One of the forms of GELU, or SiLU, which is x * sigmoid(x)."""
        g = self.graph
        if kind == "silu":
            if self.on_cpu:
                return g.op("QuickGelu", name, x, domain=CONTRIB, alpha=1.0)
            return g.op("Mul", name, x, g.op("Sigmoid", f"{name}.sigmoid", x))
        if kind == "gelu":
            return g.op("Gelu", name, x)
        if kind == "gelu_pytorch_tanh":
            if self.on_cpu:
                return g.op("FastGelu", name, x, domain=CONTRIB)
            return g.op("Gelu", name, x, approximate="tanh")
        if self.on_cpu:
            return g.op("QuickGelu", name, x, domain=CONTRIB, alpha=_QUICK)
        scaled = g.op("Mul", f"{name}.scaled", x, g.constant("quick_gelu", _QUICK))
        return g.op("Mul", name, x, g.op("Sigmoid", f"{name}.sigmoid", scaled))

    def self_attention(self, name: str, x: str, qkv: str, out: str, sizes: AttentionSizes) -> str:
        """Every row attends to all rows of its crop; ``qkv`` and ``out`` are products."""
        q, k, v = self.linear.parts(qkv, x, [f"{name}.{part}" for part in "qkv"])
        return self.linear(out, self.attention(name, q, k, v, sizes))

    def attention(
        self, name: str, q: str, k: str, v: str, sizes: AttentionSizes, mask: str | None = None
    ) -> str:
        """The values mixed; all are (n, rows, heads together).

        ``mask`` is for ``cpu`` an int32 (n, rows), 0 where there is no key, else float32
        (n, 1, 1, rows), added to the scores.
        """
        if not self.on_cpu:
            return self._standard_attention(name, q, k, v, sizes, mask)
        inputs = (q, k, v, "", mask) if mask else (q, k, v)
        return self.graph.op(
            "MultiHeadAttention",
            f"{name}.mixed",
            *inputs,
            domain=CONTRIB,
            num_heads=sizes.n_heads,
        )

    def _standard_attention(
        self, name: str, q: str, k: str, v: str, sizes: AttentionSizes, mask: str | None
    ) -> str:
        g = self.graph
        split_heads = self.ints(0, 0, sizes.n_heads, sizes.head_dim)
        q, k, v = (
            g.op(
                "Transpose",
                f"{part}.heads",
                g.op("Reshape", f"{part}.split_heads", part, split_heads),
                perm=perm,
            )
            for part, perm in ((q, (0, 2, 1, 3)), (k, (0, 2, 3, 1)), (v, (0, 2, 1, 3)))
        )
        q = g.op("Mul", f"{name}.q.scaled", q, self.head_scale(sizes))
        scores = g.op("MatMul", f"{name}.scores", q, k)
        if mask:
            scores = g.op("Add", f"{name}.scores.masked", scores, mask)
        weights = g.op("Softmax", f"{name}.weights", scores, axis=-1)
        mixed = g.op("MatMul", f"{name}.mixed", weights, v)
        mixed = g.op("Transpose", f"{name}.mixed.by_patch", mixed, perm=(0, 2, 1, 3))
        return g.op("Reshape", f"{name}.mixed.joined", mixed, self.ints(0, 0, sizes.q_size))

    def smoothed(self, name: str, x: str) -> str:
        """Divide the features by what was moved out of them under ``name``; see ``Move``."""
        if name not in self.recipe.rows:
            return x
        shares = self.graph.constant("smoothing", 1 / self.recipe.rows[name])
        return self.graph.op("Mul", "smoothed_features", x, shares)

    def matrix(self, name: str, values: Values) -> str:
        """Values that are added, not multiplied with."""
        store = self.graph.half_weight if self.recipe.precision != "fp32" else self.graph.weight
        return store(name, values.shape, values.read)

    def floats(self, name: str, x: str) -> str:
        """A value of another type as float32."""
        return self.graph.op("Cast", name, x, to=TensorProto.FLOAT)

    def ints(self, *values: int) -> str:
        """An int64 constant, shared by all nodes that need the same one."""
        name = "ints_" + "_".join(str(value).replace("-", "minus") for value in values)
        return self.graph.constant(name, np.array(values, np.int64))

    def head_scale(self, sizes: AttentionSizes) -> str:
        """The constant 1 / sqrt(head_dim)."""
        return self.graph.constant(f"scale_{sizes.head_dim}", 1.0 / math.sqrt(sizes.head_dim))

    def _moved(self, values: Values, maker: str) -> Float32:
        return self.recipe.vector(values.read(), maker)
