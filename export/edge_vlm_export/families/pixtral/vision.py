"""Pixtral's vision tower and projector.

RMSNorm behind the patches, then blocks with RMSNorm, rotary positions of row and column and a gated
feed-forward part, no biases, no norm behind the last. Patches attend over the whole picture: on the
CPU in onnxruntime's flash attention, else some rows' queries at a time; no scores of all patches
with all are ever held.

``vit_features`` (1, n_patches, hidden_size) is the output of the last block.

Source: "Pixtral 12B" (arXiv 2410.07073), section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm_export.families.any_size import PLACES, GatedBlock, in_parts, rotated
from edge_vlm_export.graph.architecture import (
    CROPS,
    AttentionSizes,
    Axes,
    Linear,
    Move,
    Stage,
    Tower,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_vlm.families.pixtral.processor import PixtralImageProcessor
    from edge_vlm_export.checkpoint.tensors import Shape
    from edge_vlm_export.families.pixtral.config import Config
    from edge_vlm_export.graph.layers import Layers

VISION = "vision_tower."
PROJECTOR = "multi_modal_projector"
EMBEDDING = "patch_embed"
EPS = 1e-5
PARTS = 16  # of a picture's rows, where their scores would be held as a whole
HIDDEN = "ln_pre"  # what the first block reads


def vision_tower(config: Config, images: PixtralImageProcessor) -> Tower:
    """All blocks and the projector."""
    builder = _Builder(config, images)
    vision = config.vision_config
    blocks = map(builder.block, range(vision.num_hidden_layers))
    pieces = [builder.embedding(), *blocks, builder.projector()]
    linears: dict[str, Linear] = {}
    norms: dict[str, Shape] = {f"{VISION}ln_pre.weight": (vision.hidden_size,)}
    for index in range(vision.num_hidden_layers):
        for part in ("attention_norm", "ffn_norm"):
            norms[f"{_stored(index)}.{part}.weight"] = (vision.hidden_size,)
    for _, products in pieces:
        linears |= products
    return Tower(
        crop_shape=images.crop_axes,
        stages=tuple(stage for stage, _ in pieces),
        linears=linears,
        tensors=norms,
    )


@dataclass(frozen=True)
class _Builder:
    config: Config
    images: PixtralImageProcessor

    @property
    def heads(self) -> AttentionSizes:
        vision = self.config.vision_config
        n_heads = vision.num_attention_heads
        return AttentionSizes(n_heads, n_heads, vision.hidden_size // n_heads)

    @property
    def frequencies(self) -> npt.NDArray[np.float64]:
        """(2, head_dim / 4): every second one for the rows, those between for the columns."""
        n = self.heads.head_dim // 2
        theta = self.config.vision_config.theta
        frequencies: npt.NDArray[np.float64] = (theta ** -(np.arange(n) / n)).reshape(-1, 2).T
        return frequencies

    @property
    def shape(self) -> Axes:
        """Of a picture between two blocks."""
        return "n_patches", self.config.vision_config.hidden_size

    def embedding(self) -> tuple[Stage, dict[str, Linear]]:
        """``crops`` to what the first block reads."""
        vision = self.config.vision_config
        kernel = Linear(
            vision.hidden_size,
            self.images.crop_shape[1],
            (f"{VISION}patch_conv.weight",),
            stored=(3, vision.patch_size, vision.patch_size),
        )

        def add(layers: Layers) -> str:
            embedded = layers.linear(EMBEDDING, CROPS)
            return layers.rms_norm(HIDDEN, embedded, f"{VISION}ln_pre", EPS)

        stage = Stage(EMBEDDING, (CROPS,), HIDDEN, self.shape, (EMBEDDING,), add)
        return stage, {EMBEDDING: kernel}

    def block(self, index: int) -> tuple[Stage, dict[str, Linear]]:
        """See ``GatedBlock``."""
        vision = self.config.vision_config
        hidden, ffn = vision.hidden_size, vision.intermediate_size
        stored = _stored(index)
        parts = tuple(f"{stored}.attention.{part}_proj.weight" for part in "qkv")
        forward = f"{stored}.feed_forward"
        return GatedBlock(
            index=index,
            reads=(_output(index - 1), PLACES),
            output=_output(index),
            shape=self.shape,
            qkv=Linear(3 * hidden, hidden, parts),
            out=self._last(hidden, f"{stored}.attention.o_proj"),
            gate=Linear(ffn, hidden, (f"{forward}.gate_proj.weight",)),
            up=Linear(ffn, hidden, (f"{forward}.up_proj.weight",)),
            down=self._last(ffn, f"{forward}.down_proj"),
            norms=(f"{stored}.attention_norm", f"{stored}.ffn_norm"),
            eps=EPS,
            activation=vision.hidden_act,
            attention=self._attention,
        ).piece()

    def projector(self) -> tuple[Stage, dict[str, Linear]]:
        """linear_2(gelu(linear_1 x))."""
        hidden, width = self.config.vision_config.hidden_size, self.config.text_config.hidden_size
        reads = _output(self.config.vision_config.num_hidden_layers - 1)
        first, second = (f"{PROJECTOR}.linear_{n}" for n in (1, 2))

        def add(layers: Layers) -> str:
            g = layers.graph
            x = g.op("Identity", "vit_features", reads)
            g.mark(x, (layers.n_crops, *self.shape))
            h = layers.linear(first, layers.smoothed(PROJECTOR, x))
            h = layers.activation(f"{PROJECTOR}.gelu", h, self.config.projector_hidden_act)
            return g.op("Identity", "image_features", layers.linear(second, h))

        stage = Stage(
            PROJECTOR,
            (reads,),
            "image_features",
            ("n_tokens", width),
            (first, second),
            add,
            (Move(PROJECTOR, (first,)),),
        )
        biased = self.config.multimodal_projector_bias
        linears = {
            name: Linear(width, n_in, (f"{name}.weight",), (f"{name}.bias",) if biased else ())
            for name, n_in in ((first, hidden), (second, width))
        }
        return stage, linears

    def _last(self, n_in: int, tensor: str) -> Linear:
        """One of the products whose results are added up over all blocks."""
        vision = self.config.vision_config
        found = Linear(vision.hidden_size, n_in, (f"{tensor}.weight",))
        return replace(found, n_added=2 * vision.num_hidden_layers)

    def _attention(self, layers: Layers, name: str, x: str) -> str:
        """(1, n_patches, hidden_size), before the last product."""
        g, heads = layers.graph, self.heads
        q, k, v = layers.linear.parts(f"{name}.qkv", x, [f"{name}.{part}" for part in "qkv"])
        q, k = (rotated(layers, part, heads, self.frequencies) for part in (q, k))
        if layers.on_cpu:
            return layers.attention(name, q, k, v, heads)
        shape = layers.once("rows.shape", partial(_rows_shape, layers, heads.q_size))
        q = g.op("Reshape", f"{q}.by_row", q, shape)
        mixed = in_parts(layers, name, q, k, v, heads, PARTS)
        return g.op("Reshape", f"{name}.joined", mixed, layers.ints(1, -1, heads.q_size))


def _rows_shape(layers: Layers, width: int, name: str) -> str:
    """(n_rows, -1, width) of the picture, whose last patch is in its last row."""
    g = layers.graph
    last = g.op("Gather", f"{name}.last", PLACES, layers.ints(-1), axis=1)
    row = g.op("Gather", f"{name}.row", last, layers.ints(0), axis=2)
    row = g.op("Reshape", f"{name}.row.flat", row, layers.ints(-1))
    n_rows = g.op("Add", f"{name}.count", row, layers.ints(1))
    return g.op("Concat", name, n_rows, layers.ints(-1, width), axis=0)


def _stored(index: int) -> str:
    return f"{VISION}transformer.layers.{index}"


def _output(index: int) -> str:
    """The value behind a block; behind the one before the first, the normed patches."""
    return HIDDEN if index < 0 else f"layers.{index}.output"
