"""Blocks of towers for pictures of any size: rotary positions of row and column, gated products.

The graph is told each patch's row and column, ``places`` int64 (1, n_patches, 2). Half of a head's
frequencies turn by the row, the other half by the column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_vlm_export.graph.architecture import Linear, Move, Stage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_vlm_export.graph.architecture import Activation, AttentionSizes, Axes
    from edge_vlm_export.graph.layers import Layers

PLACES = "places"


@dataclass(frozen=True)
class GatedBlock:
    """x += out(attention(norm1 x)), x += down(activation(gate y) * up y) of y = norm2 x.

    ``attention`` adds what is between the products qkv and out to a graph; it is given the layers,
    a name to begin with and the normed x.
    """

    index: int
    reads: tuple[str, ...]  # x, and what attention needs besides
    output: str
    shape: Axes  # of x
    qkv: Linear
    out: Linear
    gate: Linear
    up: Linear
    down: Linear
    norms: tuple[str, str]  # RMSNorms in the checkpoint, without .weight
    eps: float
    activation: Activation
    attention: Callable[[Layers, str, str], str]

    @property
    def name(self) -> str:
        """In front of those of its parts."""
        return f"layers.{self.index}"

    def piece(self) -> tuple[Stage, dict[str, Linear]]:
        """With its products."""
        name, hidden, ffn = self.name, self.out.n_out, self.down.n_in
        qkv, out, gate, up, down = (
            f"{name}.{part}" for part in ("attn.qkv", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
        )
        linears = {qkv: self.qkv, out: self.out, gate: self.gate, up: self.up, down: self.down}
        moves = (
            Move(f"{name}.norm1", (qkv,), hidden),
            Move(qkv, (out,), 3 * hidden, (2 * hidden, None)),
            Move(f"{name}.norm2", (gate, up), hidden),
            Move(up, (down,), ffn),
        )
        stage = Stage(name, self.reads, self.output, self.shape, tuple(linears), self._add, moves)
        return stage, linears

    def _add(self, layers: Layers) -> str:
        g, name, x, kind = layers.graph, self.name, self.reads[0], self.activation
        h = layers.rms_norm(f"{name}.norm1", x, self.norms[0], self.eps)
        h = self.attention(layers, f"{name}.attn", h)
        x = g.op("Add", f"{name}.attn.residual", x, layers.linear(f"{name}.attn.out", h))
        h = layers.rms_norm(f"{name}.norm2", x, self.norms[1], self.eps)
        gate = layers.linear(f"{name}.mlp.gate", h)
        gate = layers.activation(f"{name}.mlp.{kind}", gate, kind)
        h = g.op("Mul", f"{name}.mlp.gated", gate, layers.linear(f"{name}.mlp.up", h))
        return g.op("Add", self.output, x, layers.linear(f"{name}.mlp.down", h))


def rotated(
    layers: Layers, x: str, heads: AttentionSizes, frequencies: npt.NDArray[np.floating]
) -> str:
    """Queries or keys (1, n_patches, heads together), halves of each head turned.

    ``frequencies`` are (head_dim / 4,) for both, or (2, head_dim / 4): of rows, of columns.
    """
    g = layers.graph
    cos, sin = (_angles(layers, function, frequencies) for function in ("Cos", "Sin"))
    split = g.op("Reshape", f"{x}.by_head", x, layers.ints(-1, heads.n_heads, heads.head_dim))
    first, second = g.split(split, [f"{x}.first", f"{x}.second"])
    turned = [
        g.op(
            kind,
            f"{x}.{part}.turned",
            g.op("Mul", f"{x}.{part}.cos", one, cos),
            g.op("Mul", f"{x}.{part}.sin", other, sin),
        )
        for kind, part, one, other in (
            ("Sub", "first", first, second),
            ("Add", "second", second, first),
        )
    ]
    joined = g.op("Concat", f"{x}.turned", *turned, axis=-1)
    return g.op("Reshape", f"{x}.rotated", joined, layers.ints(1, -1, heads.q_size))


def _angles(layers: Layers, function: str, frequencies: npt.NDArray[np.floating]) -> str:
    """(n_patches, 1, head_dim / 2): cosines or sines, of the row and then of the column."""
    g, n = layers.graph, frequencies.shape[-1]

    def angles(name: str) -> str:
        places = layers.floats(f"{name}.places", PLACES)
        places = g.op("Reshape", f"{name}.by_axis", places, layers.ints(-1, 2, 1))
        turned = g.op("Mul", f"{name}.turned", places, g.constant("frequencies", frequencies))
        return g.op("Reshape", name, turned, layers.ints(-1, 1, 2 * n))

    return layers.once(
        f"places.{function.lower()}",
        lambda name: g.op(function, name, layers.once("places.angles", angles)),
    )


def in_parts(
    layers: Layers,
    name: str,
    q: str,
    k: str,
    v: str,
    heads: AttentionSizes,
    n_parts: int,
) -> str:
    """Attention to the whole picture, some groups of queries at a time.

    Standard operators without a loop cannot do it for one group after the other, and the scores of
    all patches with all are too many.

    Args:
        layers: the graph.
        name: in front of those of the nodes.
        q: queries (n_groups, n, heads together), of any sizes.
        k: keys (1, n_patches, heads together).
        v: values, likewise.
        heads: their sizes.
        n_parts: how many times some are computed.

    Returns:
        As ``q``.
    """
    g = layers.graph
    split = layers.ints(-1, heads.n_heads, heads.head_dim)
    k, v = (g.op("Reshape", f"{part}.split", part, split) for part in (k, v))
    k = g.op("Transpose", f"{k}.heads", k, perm=(1, 2, 0))
    v = g.op("Transpose", f"{v}.heads", v, perm=(1, 0, 2))
    by_head = layers.ints(0, 0, heads.n_heads, heads.head_dim)
    mixed = []
    for index in range(n_parts):
        part = f"{name}.part{index}"
        edges = _edges(layers, q, index, n_parts)
        some = g.op("Slice", f"{part}.q", q, *edges, layers.ints(0))
        some = g.op("Reshape", f"{part}.split", some, by_head)
        some = g.op("Transpose", f"{part}.heads", some, perm=(0, 2, 1, 3))
        some = g.op("Mul", f"{part}.scaled", some, layers.head_scale(heads))
        some = g.op("MatMul", f"{part}.scores", some, k)
        some = g.op("Softmax", f"{part}.weights", some, axis=-1)
        some = g.op("MatMul", f"{part}.values", some, v)
        some = g.op("Transpose", f"{part}.by_patch", some, perm=(0, 2, 1, 3))
        mixed.append(g.op("Reshape", f"{part}.joined", some, layers.ints(0, 0, heads.q_size)))
    return g.op("Concat", f"{name}.mixed", *mixed, axis=0)


def _edges(layers: Layers, q: str, index: int, n_parts: int) -> tuple[str, str]:
    """First group of a part, and the first behind it; there may be none in the last ones."""
    g = layers.graph

    def size(name: str) -> str:
        shape = g.op("Shape", f"{name}.of", q, start=0, end=1)
        padded = g.op("Add", f"{name}.padded", shape, layers.ints(n_parts - 1))
        return g.op("Div", name, padded, layers.ints(n_parts))

    def edge(number: int) -> str:
        many = layers.once("queries.part", size)
        return layers.once(
            f"queries.edge{number}",
            lambda name: g.op("Mul", name, many, layers.ints(number)),
        )

    return edge(index), edge(index + 1)
