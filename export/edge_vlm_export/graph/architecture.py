"""What a vision tower with its connector is made of, before it becomes a graph of some precision.

A tower is a chain of stages: the embedding of the patches, the blocks, the connector. Each adds its
nodes to a graph when asked, so the same description gives the whole of ``vision.onnx`` and single
stages, which are run one after the other to calibrate and to measure what a precision loses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32, Shape, Values, stacked

if TYPE_CHECKING:
    from edge_vlm_export.graph.layers import Layers

CROPS = "crops"
Activation = Literal["gelu_pytorch_tanh", "gelu", "quick_gelu", "silu"]
Axes = tuple["int | str", ...]  # of a graph's value; one of any length has a name


@dataclass(frozen=True)
class AttentionSizes:
    """Heads of one attention layer."""

    n_heads: int
    n_kv_heads: int
    head_dim: int

    @property
    def q_size(self) -> int:
        """Values of all queries of one position."""
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Values of all keys (or all values) of one position."""
        return self.n_kv_heads * self.head_dim


@dataclass(frozen=True)
class Linear:
    """One product: its size, and the tensors that hold its weight and bias.

    Several tensors are stacked: q_proj, k_proj and v_proj make one product. A convolution over
    patches that do not overlap is one too: ``stored`` is then what a row has in the file.
    """

    n_out: int
    n_in: int
    weights: tuple[str, ...]
    biases: tuple[str, ...] = ()
    stored: Shape = ()  # of one row, (n_in,) by default
    scale: str | None = None  # a tensor (n_out,) that multiplies what comes out
    n_added: int = 1  # products that a residual stream sums up, this one among them

    def shapes(self) -> dict[str, Shape]:
        """The tensors' names and shapes; stacked ones are of equal size."""
        rows = {name: (self.n_out // len(self.weights),) for name in self.weights}
        shapes: dict[str, Shape] = {
            n: (*r, *(self.stored or (self.n_in,))) for n, r in rows.items()
        }
        shapes |= {name: (self.n_out // len(self.biases),) for name in self.biases}
        return shapes | ({self.scale: (self.n_out,)} if self.scale else {})

    def weight(self, tensors: Checkpoint) -> Float32:
        """(n_out, n_in)."""
        return self._scaled(tensors, self.weights).flat().read()

    def bias(self, tensors: Checkpoint) -> Float32:
        """(n_out,)."""
        return self._scaled(tensors, self.biases).read()

    def _scaled(self, tensors: Checkpoint, names: Sequence[str]) -> Values:
        values = stacked(*map(tensors.values, names))
        return values.scaled(tensors.values(self.scale)) if self.scale else values


@dataclass(frozen=True)
class Move:
    """A place where channels can be moved out of an activation: who makes it, and who reads it.

    ``maker`` is a norm or a product, whose weights then make smaller values, or a name under which
    the stage divides features by the factors (``Layers.smoothed``); that has no ``n_rows``.
    """

    maker: str
    readers: tuple[str, ...]  # products
    n_rows: int | None = None  # of the maker's output
    rows: tuple[int, int | None] = (0, None)  # those of them that the readers read, from, to


@dataclass(frozen=True)
class Stage:
    """One link of the chain.

    ``add`` adds the nodes from ``reads`` to ``writes``. Values keep their names in every graph.
    """

    name: str
    reads: tuple[str, ...]  # crops, other inputs of the graph, or what earlier stages wrote
    writes: str
    shape: Axes  # of what it writes, for one crop
    products: tuple[str, ...]  # in the order of computation
    add: Callable[[Layers], object]
    moves: tuple[Move, ...] = ()


@dataclass(frozen=True)
class Tower:
    """A vision tower and its connector; the last stage writes one crop's vectors.

    Where a stage marks a value as ``vit_features``, that is what the connector reads.
    """

    crop_shape: Axes  # (n_patches, patch_values)
    stages: tuple[Stage, ...]
    linears: Mapping[str, Linear]  # every product, by its name in the graph and in reports
    tensors: Mapping[str, Shape]  # those that take part in no product
    unused: Mapping[str, Shape] = field(default_factory=dict)  # may be stored, change nothing

    @property
    def products(self) -> tuple[str, ...]:
        """All products, in the order of computation."""
        return tuple(name for stage in self.stages for name in stage.products)

    def shapes(self) -> dict[str, Shape]:
        """Every tensor that the result depends on."""
        shapes = dict(self.tensors)
        for linear in self.linears.values():
            shapes |= linear.shapes()
        return shapes

    def shape_of(self, value: str) -> Axes:
        """Of a value that a stage reads, for one crop; () of other inputs of the graph."""
        if value == CROPS:
            return self.crop_shape
        return next((stage.shape for stage in self.stages if stage.writes == value), ())
