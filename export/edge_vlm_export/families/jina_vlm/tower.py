"""``vision.onnx``: vision tower and connector as one graph, from crops to decoder-ready vectors.

Contract (``n_crops`` is dynamic, everything else fixed by the checkpoint):

* ``crops`` float32 (n_crops, n_patches, patch_values): flattened patches in [-1, 1]
* ``is_last`` bool (n_crops,): true for the crop whose patches all get ``pad_embed[1]``
* ``embeddings`` float32 (n_crops, tokens_per_crop, hidden): the connector's output plus the
  decoder's embedding row of <im_patch>, which is what the decoder reads at such a position
* ``marker_embeddings`` float32 (3, hidden): the decoder's rows of <im_start>, <im_col>, <im_end>

Two inner values have stable names, for tests and for the curious: ``vit_features`` (n_crops,
n_patches, feature_size), the used hidden states side by side after blank crops were zeroed, and
``image_features``, the connector's output before the row is added.

Sources: SigLIP 2 (arXiv 2502.14786) for the tower, "jina-vlm" (arXiv 2512.04032) and Molmo (arXiv
2409.17146) for the connector. Sums of products run in float32 or in int32, never in fp16.

Two layouts: ``portable`` has operators of the ONNX standard only, ``cpu`` also those that
onnxruntime adds (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto

from edge_vlm.families.jina_vlm.processor import JinaImageProcessor as ImageProcessor
from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32, Tensor
from edge_vlm_export.families.jina_vlm.config import AttentionSizes, Settings, VisionSettings
from edge_vlm_export.families.jina_vlm.layout import EMBEDDING, NEW_EMBEDDING, VISION
from edge_vlm_export.graph.onnx_graph import (
    CONTRIB,
    EXTERNAL_DATA_BYTES,
    OPSET,
    OPSET_INT4,
    Graph,
    Load,
    Written,
)
from edge_vlm_export.graph.precision import CONNECTOR_INPUT, Recipe
from edge_vlm_export.graph.products import Products

PRECISIONS = ("fp32", "fp16")  # those that need no calibration
PRODUCER = "edge-vlm"


def build_vision(
    checkpoint: Checkpoint,
    settings: Settings,
    special: Mapping[str, int],
    precision: str | Recipe,
) -> Graph:
    """The graph of ``vision.onnx``; the checkpoint's tensors are read when it is saved.

    ``special`` gives the ids of the image tokens, whose decoder rows the graph carries.
    """
    recipe = precision if isinstance(precision, Recipe) else Recipe(precision)
    return Builder(checkpoint, settings, recipe).whole(special)


def write_vision(
    graph: Graph,
    path: Path,
    written: Written = lambda n_bytes: None,
    external_bytes: int = EXTERNAL_DATA_BYTES,
) -> list[Path]:
    """Save the graph, large weights in ``vision.onnx.data``; returns the files written."""
    return graph.save(path, external_bytes, written, PRODUCER)


class Builder:
    """Builds the whole graph, or one stage of it: the embedding, a block, the connector."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, recipe: Recipe) -> None:
        self.checkpoint = checkpoint
        self.vision: VisionSettings = settings.vision
        self.images: ImageProcessor = settings.image_processor
        self.vocab_size = settings.text.vocab_size
        self.recipe = recipe
        portable_int4 = recipe.precision == "int4" and recipe.target == "portable"
        self.graph = Graph("vision", OPSET_INT4 if portable_int4 else OPSET)
        self.linear = Products(self.graph, checkpoint, recipe)
        self.n_crops: int | str = "n_crops" if recipe.batch is None else recipe.batch

    def whole(self, special: Mapping[str, int]) -> Graph:
        """The graph of ``vision.onnx``."""
        g, n_crops, hidden = self.graph, self.n_crops, self.vision.output_size
        images = self.images
        g.input("crops", TensorProto.FLOAT, (n_crops, images.n_patches, images.patch_values))
        g.input("is_last", TensorProto.BOOL, (n_crops,))
        features = self._mark_blank(self._tower())
        g.mark(features, (n_crops, images.n_patches, self.vision.feature_size))
        image_features = self._connector(features)
        out_shape = (n_crops, images.tokens_per_crop, hidden)
        g.mark(image_features, out_shape)
        row = self._rows("im_patch_embedding", [special["<im_patch>"]])
        g.op("Add", "embeddings", image_features, row)
        g.output("embeddings", out_shape)
        markers = [special[text] for text in ("<im_start>", "<im_col>", "<im_end>")]
        g.op("Identity", "marker_embeddings", self._rows("markers", markers))
        g.output("marker_embeddings", (len(markers), hidden))
        return g

    def embedding(self) -> Graph:
        """Stage ``crops`` (n_crops, n_patches, patch_values) to ``positioned``, before block 0."""
        images = self.images
        shape = (self.n_crops, images.n_patches, images.patch_values)
        self.graph.input("crops", TensorProto.FLOAT, shape)
        return self._stage(self._embed("crops"))

    def block(self, layer: int) -> Graph:
        """Stage ``x`` to ``layers.N.output``, both (n_crops, n_patches, hidden)."""
        shape = (self.n_crops, self.images.n_patches, self.vision.hidden_size)
        self.graph.input("x", TensorProto.FLOAT, shape)
        return self._stage(self._block("x", f"layers.{layer}"))

    def connector(self) -> Graph:
        """Stage ``vit_features`` and ``is_last`` to ``image_features``."""
        shape = (self.n_crops, self.images.n_patches, self.vision.feature_size)
        self.graph.input("vit_features", TensorProto.FLOAT, shape)
        self.graph.input("is_last", TensorProto.BOOL, (self.n_crops,))
        return self._stage(self._connector("vit_features"))

    def final_norm(self) -> Graph:
        """Stage ``x`` to ``post_lnorm``, both (n_crops, n_patches, hidden)."""
        shape = (self.n_crops, self.images.n_patches, self.vision.hidden_size)
        self.graph.input("x", TensorProto.FLOAT, shape)
        return self._stage(self._norm("post_lnorm", "x"))

    def _stage(self, output: str) -> Graph:
        """The result first, then what every product reads."""
        for name in dict.fromkeys([output, *self.linear.inputs.values()]):
            if name not in {value.name for value in self.graph.inputs}:
                self.graph.output(name, None)
        return self.graph

    def _tower(self) -> str:
        """The used hidden states side by side: (n_crops, n_patches, feature_size)."""
        g, vision = self.graph, self.vision
        x = self._embed("crops")
        states = {}
        for layer in range(vision.n_used_layers):
            x = states[layer] = self._block(x, f"layers.{layer}")
        if vision.uses_final_norm:
            states[vision.n_layers] = self._norm("post_lnorm", x)
        used = [states[index] for index in vision.used_states]
        return g.op("Concat", "states", *used, axis=-1)

    def _embed(self, crops: str) -> str:
        x = self.linear("patch_embed.proj", crops, ["patch_embed.proj.bias"])
        return self.graph.op("Add", "positioned", x, self._tensor("pos_embed"))

    def _block(self, x: str, name: str) -> str:
        g = self.graph
        h = self._norm(f"{name}.attn_lnorm", x)
        h = self._self_attention(h, f"{name}.attn")
        x = g.op("Add", f"{name}.attn.residual", x, h)
        h = self._norm(f"{name}.ffn_lnorm", x)
        h = self.linear(f"{name}.ffn.up", h, [f"{name}.ffn.up.bias"])
        if self.recipe.target == "cpu":
            h = g.op("FastGelu", f"{name}.ffn.gelu", h, domain=CONTRIB)
        else:
            h = g.op("Gelu", f"{name}.ffn.gelu", h, approximate="tanh")
        h = self.linear(f"{name}.ffn.down", h, [f"{name}.ffn.down.bias"])
        return g.op("Add", f"{name}.output", x, h)

    def _self_attention(self, x: str, name: str) -> str:
        """(n_crops, n_patches, hidden) to the same shape, every patch attending to all."""
        g, sizes = self.graph, self.vision.attention
        biases = [f"{name}.{part}_b" for part in "qkv"]
        q, k, v = self.linear.parts(
            f"{name}.qkv_w", x, biases, [f"{name}.{part}" for part in "qkv"]
        )
        if self.recipe.target == "cpu":
            mixed = g.op(
                "MultiHeadAttention",
                f"{name}.mixed",
                *(q, k, v),
                domain=CONTRIB,
                num_heads=sizes.n_heads,
            )
        else:
            mixed = self._standard_attention(name, q, k, v)
        return self.linear(f"{name}.out", mixed, [f"{name}.out.bias"])

    def _standard_attention(self, name: str, q: str, k: str, v: str) -> str:
        g, sizes = self.graph, self.vision.attention
        split_heads = self._shape((0, 0, sizes.n_heads, sizes.head_dim))
        q, k, v = (
            g.op(
                "Transpose",
                f"{part}.heads",
                g.op("Reshape", f"{part}.split_heads", part, split_heads),
                perm=perm,
            )
            for part, perm in ((q, (0, 2, 1, 3)), (k, (0, 2, 3, 1)), (v, (0, 2, 1, 3)))
        )
        q = g.op("Mul", f"{name}.q.scaled", q, self._scale(sizes))
        scores = g.op("MatMul", f"{name}.scores", q, k)
        weights = g.op("Softmax", f"{name}.weights", scores, axis=-1)
        mixed = g.op("MatMul", f"{name}.mixed", weights, v)
        mixed = g.op("Transpose", f"{name}.mixed.by_patch", mixed, perm=(0, 2, 1, 3))
        return g.op("Reshape", f"{name}.mixed.joined", mixed, self._shape((0, 0, sizes.q_size)))

    def _mark_blank(self, states: str) -> str:
        """Zero the features of crops that are black throughout: every value exactly -1."""
        g = self.graph
        axes, black = self._shape((1, 2)), g.constant("black", -1.0)
        extremes = [
            g.op(
                "Equal",
                f"{kind}.is_black",
                g.op(f"Reduce{kind}", f"crops.{kind}", "crops", axes),
                black,
            )
            for kind in ("Max", "Min")
        ]
        blank = g.op("And", "is_blank", *extremes)  # (n_crops, 1, 1)
        keep = g.op("Cast", "is_not_blank", g.op("Not", "not_blank", blank), to=TensorProto.FLOAT)
        return g.op("Mul", "vit_features", states, keep)

    def _connector(self, features: str) -> str:
        """(n_crops, n_patches, feature_size) to (n_crops, tokens_per_crop, output_size)."""
        g, images, size = self.graph, self.images, self.vision.feature_size
        is_last = g.op("Cast", "is_last.float", "is_last", to=TensorProto.FLOAT)
        is_last = g.op("Reshape", "is_last.column", is_last, self._shape((-1, 1, 1)))
        pad_embed = self.checkpoint[f"{VISION}vl_connector.pad_embed"]
        pad = self._matrix("vl_connector.pad_embed.1", (1, size), lambda: pad_embed.rows(1, 2))
        x = g.op("Add", "padded_features", features, g.op("Mul", "pad", is_last, pad))
        if CONNECTOR_INPUT in self.recipe.rows:
            shares = 1 / self.recipe.rows[CONNECTOR_INPUT]
            x = g.op("Mul", "smoothed_features", x, g.constant("smoothing", shares))

        rows, columns = images.patches_hw
        out_rows, out_columns = images.token_length_h, images.token_length_w
        pool_h, pool_w = images.pooling_h, images.pooling_w
        extra = (out_rows * pool_h - rows, out_columns * pool_w - columns)
        x = g.op("Reshape", "grid", x, self._shape((0, rows, columns, size)))
        if any(extra):
            pads = self._shape((0, 0, 0, 0, 0, *extra, 0))
            x = g.op("Pad", "grid.padded", x, pads)
        x = g.op(
            "Reshape",
            "grid.split",
            x,
            self._shape((0, out_rows, pool_h, out_columns, pool_w, size)),
        )
        x = g.op("Transpose", "grid.windows", x, perm=(0, 1, 3, 2, 4, 5))
        windows = g.op("Reshape", "windows", x, self._shape((-1, pool_h * pool_w, size)))
        pooled = self._pool(windows)
        x = self._projector(pooled)
        shape = self._shape((-1, images.tokens_per_crop, self.vision.output_size))
        return g.op("Reshape", "image_features", x, shape)

    def _pool(self, windows: str) -> str:
        """(n_windows, patches, feature_size) to (n_windows, hidden): the mean attends to them.

        With one query and a handful of keys, products and sums beat batched matrix products.
        """
        g, sizes, name = self.graph, self.vision.pooling_attention, "vl_connector.pooling"
        query = g.op("ReduceMean", f"{name}.query", windows, self._shape((1,)), keepdims=1)
        q = self.linear(f"{name}.q_w", query, [f"{name}.q_b"])
        biases = [f"{name}.k_b", f"{name}.v_b"]
        k, v = self.linear.parts(f"{name}.kv_w", windows, biases, [f"{name}.k", f"{name}.v"])
        heads = self._shape((0, 0, sizes.n_heads, sizes.head_dim))
        q, k, v = (g.op("Reshape", f"{part}.heads", part, heads) for part in (q, k, v))
        q = g.op("Mul", f"{name}.q.scaled", q, self._scale(sizes))
        products = g.op("Mul", f"{name}.products", q, k)
        scores = g.op("ReduceSum", f"{name}.scores", products, self._shape((3,)), keepdims=1)
        weights = g.op("Softmax", f"{name}.weights", scores, axis=1)
        weighted = g.op("Mul", f"{name}.weighted", weights, v)
        mixed = g.op("ReduceSum", f"{name}.mixed", weighted, self._shape((1,)), keepdims=0)
        mixed = g.op("Reshape", f"{name}.joined", mixed, self._shape((-1, sizes.q_size)))
        return self.linear(f"{name}.out", mixed, [f"{name}.out.bias"])

    def _projector(self, x: str) -> str:
        """(n_windows, hidden) to (n_windows, output_size): down(silu(gate) * up)."""
        g, name = self.graph, "vl_connector.projector"
        halves = [f"{name}.up_half", f"{name}.gate_half"]
        up, gate = self.linear.parts(f"{name}.up", x, [], halves)
        silu = g.op("Mul", f"{name}.silu", gate, g.op("Sigmoid", f"{name}.sigmoid", gate))
        return self.linear(f"{name}.down", g.op("Mul", f"{name}.gated", silu, up))

    def _norm(self, name: str, x: str) -> str:
        g = self.graph
        parts = []
        for part in ("weight", "bias"):
            tensor = self.checkpoint[f"{VISION}{name}.{part}"]
            parts.append(g.weight(f"{name}.{part}", tensor.shape, self._smoothed(tensor, name)))
        return g.op("LayerNormalization", name, x, *parts, axis=-1, epsilon=self.vision.norm_eps)

    def _smoothed(self, tensor: Tensor, maker: str) -> Load:
        return lambda: self.recipe.vector(tensor.read(), maker)

    def _tensor(self, name: str) -> str:
        tensor = self.checkpoint[f"{VISION}{name}"]
        return self._matrix(name, tensor.shape, tensor.read)

    def _matrix(self, name: str, shape: tuple[int, ...], load: Load) -> str:
        """A matrix that is added, not multiplied with."""
        store = self.graph.half_weight if self.recipe.stores_half else self.graph.weight
        return store(name, shape, load)

    def _rows(self, name: str, tokens: list[int]) -> str:
        """Rows of the decoder's token table, always float32: (len(tokens), hidden)."""

        def load() -> Float32:
            return decoder_rows(self.checkpoint, self.vocab_size, tokens)

        return self.graph.weight(name, (len(tokens), self.vision.output_size), load)

    def _shape(self, values: tuple[int, ...]) -> str:
        """An int64 constant, shared by all nodes that need the same one."""
        name = "ints_" + "_".join(str(value).replace("-", "minus") for value in values)
        return self.graph.constant(name, np.array(values, np.int64))

    def _scale(self, sizes: AttentionSizes) -> str:
        return self.graph.constant(f"scale_{sizes.head_dim}", 1.0 / math.sqrt(sizes.head_dim))


def decoder_rows(checkpoint: Checkpoint, vocab_size: int, tokens: Sequence[int]) -> Float32:
    """Rows of the decoder's token table: (len(tokens), hidden)."""
    rows = []
    for token in tokens:
        source, row = EMBEDDING, token
        if token >= vocab_size:
            source, row = NEW_EMBEDDING, token - vocab_size
        rows.append(checkpoint[source].rows(row, row + 1))
    return np.concatenate(rows)
