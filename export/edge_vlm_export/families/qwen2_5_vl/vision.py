"""Qwen2.5-VL's vision tower and merger.

Blocks with RMSNorm, rotary positions of row and column, and a gated feed-forward part. Most attend
inside windows of 8 x 8 patches: every window is filled up to a whole one, so that all are a batch
of their own, and what filled them is masked. The others attend over the whole picture: on the CPU
in onnxruntime's flash attention, which holds no scores of all patches with all, else in parts.

``vit_features`` (1, n_patches, hidden_size) is the output of the last block, in block order.

Source: "Qwen2.5-VL Technical Report" (arXiv 2502.13923), section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from edge_vlm_export.families.any_size import PLACES, GatedBlock, in_parts, rotated
from edge_vlm_export.families.vit import linear
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

    from edge_vlm.families.qwen2_5_vl.processor import QwenImageProcessor
    from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32, Shape
    from edge_vlm_export.families.qwen2_5_vl.config import VisionConfig
    from edge_vlm_export.graph.layers import Layers

VISION = "visual."
EMBEDDING = "patch_embed"
MERGER = "merger"
ARRANGEMENT = (
    PLACES,
    "windows",
    "filled",
    "slots",
)  # see families.qwen2_5_vl.patches of the runtime
EPS = 1e-6
THETA = 10000.0
PARTS = 32  # of a picture's queries, where its scores would be held as a whole
_NOTHING = -1e30  # added to scores of what is not there


@dataclass(frozen=True)
class FoldedKernel(Linear):
    """The convolution over a film of equal frames, which sees their sum."""

    def weight(self, tensors: Checkpoint) -> Float32:
        """(n_out, n_in): (n_out, 3, frames, patch, patch), the frames added up."""
        kernel: Float32 = tensors[self.weights[0]].read().sum(axis=2)
        return kernel.reshape(self.n_out, self.n_in)


def vision_tower(vision: VisionConfig, images: QwenImageProcessor) -> Tower:
    """All blocks and the merger."""
    builder = _Builder(vision, images)
    pieces = [builder.embedding(), *map(builder.block, range(vision.depth)), builder.merger()]
    linears: dict[str, Linear] = {}
    norms: dict[str, Shape] = {f"{VISION}merger.ln_q.weight": (vision.hidden_size,)}
    for index in range(vision.depth):
        for part in ("norm1", "norm2"):
            norms[f"{VISION}blocks.{index}.{part}.weight"] = (vision.hidden_size,)
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
    vision: VisionConfig
    images: QwenImageProcessor

    @property
    def heads(self) -> AttentionSizes:
        n_heads = self.vision.num_heads
        return AttentionSizes(n_heads, n_heads, self.vision.hidden_size // n_heads)

    @property
    def frequencies(self) -> npt.NDArray[np.float64]:
        """(head_dim / 4,), for rows and columns alike."""
        n = self.heads.head_dim // 4
        frequencies: npt.NDArray[np.float64] = THETA ** -(np.arange(n) / n)
        return frequencies

    @property
    def shape(self) -> Axes:
        """Of a picture between two blocks."""
        return "n_patches", self.vision.hidden_size

    def embedding(self) -> tuple[Stage, dict[str, Linear]]:
        """``crops`` to what the first block reads."""
        vision = self.vision
        kernel = FoldedKernel(
            vision.hidden_size,
            self.images.crop_shape[1],
            (f"{VISION}patch_embed.proj.weight",),
            stored=(3, vision.temporal_patch_size, vision.patch_size, vision.patch_size),
        )

        def add(layers: Layers) -> str:
            embedded = layers.linear(EMBEDDING, CROPS)
            return layers.graph.op("Identity", _output(-1), embedded)

        stage = Stage(EMBEDDING, (CROPS,), _output(-1), self.shape, (EMBEDDING,), add)
        return stage, {EMBEDDING: kernel}

    def block(self, index: int) -> tuple[Stage, dict[str, Linear]]:
        """See ``GatedBlock``."""
        hidden, ffn = self.vision.hidden_size, self.vision.intermediate_size
        stored = f"{VISION}blocks.{index}"
        is_full = index in self.vision.fullatt_block_indexes
        return GatedBlock(
            index=index,
            reads=(_output(index - 1), *ARRANGEMENT),
            output=_output(index),
            shape=self.shape,
            qkv=linear(3 * hidden, hidden, f"{stored}.attn.qkv"),
            out=self._last(hidden, f"{stored}.attn.proj"),
            gate=linear(ffn, hidden, f"{stored}.mlp.gate_proj"),
            up=linear(ffn, hidden, f"{stored}.mlp.up_proj"),
            down=self._last(ffn, f"{stored}.mlp.down_proj"),
            norms=(f"{stored}.norm1", f"{stored}.norm2"),
            eps=EPS,
            activation="silu",
            attention=partial(self._attention, is_full=is_full),
        ).piece()

    def merger(self) -> tuple[Stage, dict[str, Linear]]:
        """mlp.2(gelu(mlp.0 x)) of the patches of a block side by side, each of them normed."""
        width = self.vision.hidden_size * self.images.block_patches
        out = self.vision.out_hidden_size
        reads, first, second = _output(self.vision.depth - 1), f"{MERGER}.mlp.0", f"{MERGER}.mlp.2"

        def add(layers: Layers) -> str:
            g = layers.graph
            x = g.op("Identity", "vit_features", reads)
            g.mark(x, (layers.n_crops, *self.shape))
            x = layers.rms_norm(f"{MERGER}.norm", x, f"{VISION}merger.ln_q", EPS)
            x = g.op("Reshape", f"{MERGER}.blocks", x, layers.ints(1, -1, width))
            h = layers.linear(first, layers.smoothed(MERGER, x))
            h = layers.activation(f"{MERGER}.gelu", h, "gelu")
            return g.op("Identity", "image_features", layers.linear(second, h))

        stage = Stage(
            MERGER,
            (reads,),
            "image_features",
            ("n_tokens", out),
            (first, second),
            add,
            (Move(MERGER, (first,)),),
        )
        linears = {
            first: linear(width, width, VISION + first),
            second: linear(out, width, VISION + second),
        }
        return stage, linears

    def _last(self, n_in: int, tensor: str) -> Linear:
        found = linear(self.vision.hidden_size, n_in, tensor)
        return Linear(found.n_out, n_in, found.weights, found.biases, n_added=2 * self.vision.depth)

    def _attention(self, layers: Layers, name: str, x: str, *, is_full: bool) -> str:
        """(1, n_patches, hidden_size), before the last product."""
        q, k, v = layers.linear.parts(f"{name}.qkv", x, [f"{name}.{part}" for part in "qkv"])
        q, k = (rotated(layers, part, self.heads, self.frequencies) for part in (q, k))
        if is_full and layers.on_cpu:
            return layers.attention(name, q, k, v, self.heads)
        q = self._in_windows(layers, q)
        if is_full:
            mixed = in_parts(layers, name, q, k, v, self.heads, PARTS)
        else:
            k, v = (self._in_windows(layers, part) for part in (k, v))
            mixed = layers.attention(name, q, k, v, self.heads, _mask(layers))
        return self._from_windows(layers, name, mixed)

    def _in_windows(self, layers: Layers, x: str) -> str:
        """(1, n_patches, ...) as (n_windows, window_patches, ...)."""
        g = layers.graph

        patches = layers.once(
            "windows.patches", lambda name: g.op("Reshape", name, "windows", layers.ints(-1))
        )
        chosen = g.op("Gather", f"{x}.gathered", x, patches, axis=1)
        n = self.images.window_blocks**2 * self.images.block_patches
        return g.op("Reshape", f"{x}.in_windows", chosen, layers.ints(-1, n, self.heads.q_size))

    def _from_windows(self, layers: Layers, name: str, x: str) -> str:
        """The other way round, what filled the windows left out."""
        g = layers.graph
        flat = g.op("Reshape", f"{name}.laid_out", x, layers.ints(1, -1, self.heads.q_size))
        slots = layers.once(
            "slots.flat", lambda made: g.op("Reshape", made, "slots", layers.ints(-1))
        )
        return g.op("Gather", f"{name}.in_order", flat, slots, axis=1)


def _mask(layers: Layers) -> str:
    """See ``Layers.attention``."""
    g, n = layers.graph, "filled.windows"

    def counted(name: str) -> str:
        flat = g.op("Squeeze", n, "filled", layers.ints(0))
        return g.op("Cast", name, flat, to=TensorProto.INT32)

    def added(name: str) -> str:
        missing = g.op("Sub", n, layers.floats(f"{n}.floats", "filled"), g.constant("one", 1.0))
        missing = g.op("Mul", f"{n}.scores", missing, g.constant("nothing", -_NOTHING))
        return g.op(
            "Transpose",
            name,
            g.op("Unsqueeze", f"{n}.rows", missing, layers.ints(1)),
            perm=(2, 0, 1, 3),
        )

    return layers.once("windows.mask", counted if layers.on_cpu else added)


def _output(index: int) -> str:
    """The value behind a block; behind the one before the first, the patches'."""
    return EMBEDDING + ".output" if index < 0 else f"layers.{index}.output"
