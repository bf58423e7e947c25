"""Vision transformers of the SigLIP, CLIP and InternViT kind: pre-norm blocks with LayerNorm.

x += out(attention(norm1(x))), x += down(activation(up(norm2(x)))), all with biases; perhaps a class
token in front, perhaps a norm before the first block, perhaps a LayerScale behind each half.

Sources: ViT (arXiv 2010.11929), CLIP (arXiv 2103.00020), SigLIP 2 (arXiv 2502.14786).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm_export.checkpoint.tensors import Float32, Shape, Values
from edge_vlm_export.graph.architecture import (
    CROPS,
    Activation,
    AttentionSizes,
    Linear,
    Move,
    Stage,
)

if TYPE_CHECKING:
    from edge_vlm_export.graph.layers import Layers

POSITIONED = "positioned"  # what the first block reads

# A stage, its products, its other tensors.
Piece = tuple[Stage, dict[str, Linear], dict[str, Shape]]


@dataclass(frozen=True)
class BlockNames:
    """What the parts of a block are called in the graph and in reports."""

    norm1: str = "norm1"
    attention: str = "attn"
    qkv: str = "attn.qkv"
    out: str = "attn.out"
    norm2: str = "norm2"
    up: str = "mlp.up"
    activation: str = "mlp.gelu"
    down: str = "mlp.down"


@dataclass(frozen=True)
class BlockTensors:
    """What they are called in the checkpoint; a norm's name goes on with .weight and .bias."""

    norm1: str
    qkv: tuple[tuple[str, ...], tuple[str, ...]]  # weights and biases, to be stacked
    out: str  # the same for a product with one weight and one bias
    norm2: str
    up: str
    down: str
    scale1: str | None = None
    scale2: str | None = None


@dataclass(frozen=True)
class PatchEmbedding:
    """From patches to what the first block reads."""

    weight: str
    positions: str
    bias: str | None = None
    stored: Shape = ()  # of one row of the weight: (3, patch, patch) for a convolution
    class_token: str | None = None  # with it, the first row of the positions is its own
    ones: int = 0  # axes of length 1 in front of the positions, twice as many of the class token
    norm: str | None = None
    product: str = "patch_embed"
    table: str = "positions"


@dataclass(frozen=True)
class Vit:
    """The transformer's sizes and names; ``tensors`` gives a block's by its index."""

    n_patches: int
    patch_values: int
    n_layers: int
    hidden_size: int
    attention: AttentionSizes
    ffn_size: int
    eps: float
    activation: Activation
    embedding: PatchEmbedding
    tensors: Callable[[int], BlockTensors]
    names: BlockNames = BlockNames()

    @property
    def shape(self) -> Shape:
        """Of one crop between two blocks."""
        return self.n_patches + (self.embedding.class_token is not None), self.hidden_size

    def parts(
        self, n_used: int
    ) -> tuple[tuple[Stage, ...], dict[str, Linear], dict[str, Shape], dict[str, Shape]]:
        """Stages up to the last block that is used, their products, their other tensors, and the
        tensors of the blocks behind it.
        """
        pieces = self._embedding(), *map(self._block, range(self.n_layers))
        linears: dict[str, Linear] = {}
        tensors: dict[str, Shape] = {}
        unused: dict[str, Shape] = {}
        for _, products, shapes in pieces[: n_used + 1]:
            linears |= products
            tensors |= shapes
        for _, products, shapes in pieces[n_used + 1 :]:
            unused |= shapes
            for product in products.values():
                unused |= product.shapes()
        return tuple(stage for stage, _, _ in pieces[: n_used + 1]), linears, tensors, unused

    def _embedding(self) -> Piece:
        """``crops`` to ``positioned``."""
        embedding, hidden = self.embedding, self.hidden_size
        ones = (1,) * embedding.ones
        shapes: dict[str, Shape] = {embedding.positions: (*ones, *self.shape)}
        if embedding.class_token:
            shapes[embedding.class_token] = (*ones, *ones, hidden)
        if embedding.norm:
            shapes |= norm_shapes(embedding.norm, hidden)
        biases, name = (embedding.bias,) if embedding.bias else (), embedding.product
        product = Linear(hidden, self.patch_values, (embedding.weight,), biases, embedding.stored)
        stage = Stage(name, (CROPS,), POSITIONED, self.shape, (name,), self._add_embedding)
        return stage, {name: product}, shapes

    def _block(self, index: int) -> Piece:
        """The output of the block before, or ``positioned``, to ``layers.N.output``."""
        prefix, names, tensors = f"layers.{index}.", self.names, self.tensors(index)
        hidden, width = self.hidden_size, self.attention.q_size
        linears = {  # in the order of computation
            prefix + names.qkv: Linear(3 * width, hidden, *tensors.qkv),
            prefix + names.out: self._last(width, tensors.out, tensors.scale1),
            prefix + names.up: linear(self.ffn_size, hidden, tensors.up),
            prefix + names.down: self._last(self.ffn_size, tensors.down, tensors.scale2),
        }
        moves = (
            Move(prefix + names.norm1, (prefix + names.qkv,), hidden),
            Move(prefix + names.qkv, (prefix + names.out,), 3 * width, (2 * width, None)),
            Move(prefix + names.norm2, (prefix + names.up,), hidden),
        )
        stage = Stage(
            f"layers.{index}",
            (block_output(index - 1),),
            block_output(index),
            self.shape,
            tuple(linears),
            partial(self._add_block, index=index),
            moves,
        )
        return (
            stage,
            linears,
            norm_shapes(tensors.norm1, hidden) | norm_shapes(tensors.norm2, hidden),
        )

    def _last(self, n_in: int, tensor: str, scale: str | None) -> Linear:
        """One of the products whose results are added up over all blocks."""
        found = linear(self.hidden_size, n_in, tensor)
        return replace(found, scale=scale, n_added=2 * self.n_layers)

    def _add_embedding(self, layers: Layers) -> str:
        embedding, g = self.embedding, layers.graph
        x = layers.linear(embedding.product, CROPS)
        if embedding.class_token:  # its vector and its position are added in one
            x = g.op("Pad", "with_class_token", x, layers.ints(0, 1, 0, 0, 0, 0))
        table = layers.matrix(embedding.table, self._positions(layers))
        if not embedding.norm:
            return g.op("Add", POSITIONED, x, table)
        x = g.op("Add", "positioned.sum", x, table)
        return layers.norm(POSITIONED, x, embedding.norm, self.eps)

    def _positions(self, layers: Layers) -> Values:
        """(rows, hidden): the position embeddings, the class token added to the first."""
        tensors, embedding = layers.tensors, self.embedding

        def blocks() -> Iterator[Float32]:
            table = tensors[embedding.positions].read().reshape(self.shape)
            if embedding.class_token:
                table[0] += tensors[embedding.class_token].read().reshape(-1)
            yield np.asarray(table)

        return Values(self.shape, blocks)

    def _add_block(self, layers: Layers, index: int) -> str:
        g, names, tensors, name = layers.graph, self.names, self.tensors(index), f"layers.{index}"
        x = block_output(index - 1)
        h = layers.norm(f"{name}.{names.norm1}", x, tensors.norm1, self.eps)
        h = layers.self_attention(
            f"{name}.{names.attention}",
            h,
            f"{name}.{names.qkv}",
            f"{name}.{names.out}",
            self.attention,
        )
        x = g.op("Add", f"{name}.{names.attention}.residual", x, h)
        h = layers.norm(f"{name}.{names.norm2}", x, tensors.norm2, self.eps)
        h = layers.linear(f"{name}.{names.up}", h)
        h = layers.activation(f"{name}.{names.activation}", h, self.activation)
        h = layers.linear(f"{name}.{names.down}", h)
        return g.op("Add", block_output(index), x, h)


def block_output(index: int) -> str:
    """The value behind a block; behind the one before the first, what the first reads."""
    return POSITIONED if index < 0 else f"layers.{index}.output"


def linear(n_out: int, n_in: int, tensor: str) -> Linear:
    """A product whose tensors are called ``tensor``.weight and .bias."""
    return Linear(n_out, n_in, (f"{tensor}.weight",), (f"{tensor}.bias",))


def norm_shapes(tensor: str, size: int) -> dict[str, Shape]:
    """Weight and bias of a norm."""
    return {f"{tensor}.weight": (size,), f"{tensor}.bias": (size,)}
