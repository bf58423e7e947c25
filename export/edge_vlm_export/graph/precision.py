"""How each matrix product of a vision graph is stored and computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Float32

PRECISIONS = ("int8", "int8-static", "int4", "fp16", "fp32")
TARGETS = ("cpu", "portable")
WEIGHTS_ONLY_INT8 = "int8-weights"
# What a product that loses too much is stored as instead.
HIGHER = {"int8": "fp16", "int8-static": "fp16", "int4": WEIGHTS_ONLY_INT8}
QUANTIZED = tuple(HIGHER)


@dataclass(frozen=True)
class Range:
    """Values of a product's input, as calibration saw them; zero lies inside."""

    low: float
    high: float

    def unsigned(self) -> tuple[np.float32, np.uint8]:
        """Scale and zero point of uint8: x is about scale * (q - zero_point)."""
        scale = max(self.high - self.low, 1e-12) / 255
        return np.float32(scale), np.uint8(round(-self.low / scale))

    def signed(self) -> tuple[np.float32, np.int8]:
        """Scale of int8 around zero, the only form TensorRT knows."""
        return np.float32(max(self.high, -self.low, 1e-12) / 127), np.int8(0)


@dataclass(frozen=True)
class Recipe:
    """Precision and layout of a graph, and what calibration found."""

    precision: str = "fp32"
    target: str = "portable"
    batch: int | None = None  # crops in a run; None leaves it open
    kept: Mapping[str, str] = field(default_factory=dict)  # product -> its own precision
    # Channels moved from a product's input into what makes that input: values made by tensor
    # ``name`` are divided by rows[name], columns of the product ``name`` multiplied.
    rows: Mapping[str, Float32] = field(default_factory=dict)
    columns: Mapping[str, Float32] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)  # inputs of products
    importance: Mapping[str, Float32] = field(default_factory=dict)  # mean square of its columns

    def of(self, product: str) -> str:
        """The precision of one product."""
        return self.kept.get(product, self.precision)

    def keeping(self, kept: Mapping[str, str]) -> Recipe:
        """The same with other products in a precision of their own."""
        return replace(self, kept=dict(kept))

    def matrix(self, product: str, weight: Float32) -> Float32:
        """A product's weight (out, in), which may be changed, with its channels moved."""
        if product in self.columns:
            weight *= self.columns[product]
        if product in self.rows:
            weight /= self.rows[product][:, None]
        return weight

    def vector(self, values: Float32, maker: str) -> Float32:
        """A bias or a norm's weight, channels moved."""
        return values / self.rows[maker] if maker in self.rows else values
