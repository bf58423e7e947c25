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
2409.17146) for the connector. Reductions run in float32 also when weights are stored as fp16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto

from edge_vlm.bundle import ImageProcessor
from edge_vlm_export.checkpoint import Checkpoint, Float32
from edge_vlm_export.config import AttentionSizes, Settings, VisionSettings
from edge_vlm_export.layout import EMBEDDING, NEW_EMBEDDING, VISION
from edge_vlm_export.onnx_graph import EXTERNAL_DATA_BYTES, Graph, Written

PRECISIONS = ("fp32", "fp16")
PRODUCER = "edge-vlm"


def build_vision(
    checkpoint: Checkpoint, settings: Settings, special: Mapping[str, int], precision: str
) -> Graph:
    """The graph of ``vision.onnx``; the checkpoint's tensors are read when it is saved.

    ``special`` gives the ids of the image tokens, whose decoder rows the graph carries.
    """
    return _Builder(checkpoint, settings, special, precision).build()


def write_vision(
    graph: Graph,
    path: Path,
    written: Written = lambda n_bytes: None,
    external_bytes: int = EXTERNAL_DATA_BYTES,
) -> list[Path]:
    """Save the graph, large weights in ``vision.onnx.data``; returns the files written."""
    return graph.save(path, external_bytes, written, PRODUCER)


class _Builder:
    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        special: Mapping[str, int],
        precision: str,
    ) -> None:
        self.checkpoint = checkpoint
        self.vision: VisionSettings = settings.vision
        self.images: ImageProcessor = settings.image_processor
        self.vocab_size = settings.text.vocab_size
        self.special = special
        self.graph = Graph("vision", half_weights=precision == "fp16")

    def build(self) -> Graph:
        g, n_crops, hidden = self.graph, "n_crops", self.vision.output_size
        images = self.images
        g.input("crops", TensorProto.FLOAT, (n_crops, images.n_patches, images.patch_values))
        g.input("is_last", TensorProto.BOOL, (n_crops,))
        features = self._mark_blank(self._tower())
        g.mark(features, (n_crops, images.n_patches, self.vision.feature_size))
        image_features = self._connector(features)
        out_shape = (n_crops, images.tokens_per_crop, hidden)
        g.mark(image_features, out_shape)
        row = self._rows("im_patch_embedding", ["<im_patch>"])
        g.op("Add", "embeddings", image_features, row)
        g.output("embeddings", out_shape)
        markers = ["<im_start>", "<im_col>", "<im_end>"]
        g.op("Identity", "marker_embeddings", self._rows("markers", markers))
        g.output("marker_embeddings", (len(markers), hidden))
        return g

    def _tower(self) -> str:
        """The used hidden states side by side: (n_crops, n_patches, feature_size)."""
        g, vision = self.graph, self.vision
        x = self._linear("patch_embed.proj", "crops", "patch_embed.proj.bias")
        x = g.op("Add", "positioned", x, self._tensor("pos_embed"))
        states = {}
        for layer in range(vision.n_used_layers):
            x = states[layer] = self._block(x, f"layers.{layer}")
        if vision.uses_final_norm:
            states[vision.n_layers] = self._norm("post_lnorm", x)
        used = [states[index] for index in vision.used_states]
        return g.op("Concat", "states", *used, axis=-1)

    def _block(self, x: str, name: str) -> str:
        g = self.graph
        h = self._norm(f"{name}.attn_lnorm", x)
        h = self._self_attention(h, f"{name}.attn")
        x = g.op("Add", f"{name}.attn.residual", x, h)
        h = self._norm(f"{name}.ffn_lnorm", x)
        h = self._linear(f"{name}.ffn.up", h, f"{name}.ffn.up.bias")
        h = g.op("Gelu", f"{name}.ffn.gelu", h, approximate="tanh")
        h = self._linear(f"{name}.ffn.down", h, f"{name}.ffn.down.bias")
        return g.op("Add", f"{name}.output", x, h)

    def _self_attention(self, x: str, name: str) -> str:
        """(n_crops, n_patches, hidden) to the same shape, every patch attending to all."""
        g, sizes = self.graph, self.vision.attention
        qkv = self._linear_parts(f"{name}.qkv_w", x, [f"{name}.{part}_b" for part in "qkv"])
        q, k, v = g.split(qkv, [f"{name}.{part}" for part in "qkv"])
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
        mixed = g.op("Reshape", f"{name}.mixed.joined", mixed, self._shape((0, 0, sizes.q_size)))
        return self._linear(f"{name}.out", mixed, f"{name}.out.bias")

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
        pad = g.weight("vl_connector.pad_embed.1", (1, size), lambda: pad_embed.rows(1, 2))
        x = g.op("Add", "padded_features", features, g.op("Mul", "pad", is_last, pad))

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
        q = self._linear(f"{name}.q_w", query, f"{name}.q_b")
        kv = self._linear_parts(f"{name}.kv_w", windows, [f"{name}.k_b", f"{name}.v_b"])
        k, v = g.split(kv, [f"{name}.k", f"{name}.v"])
        heads = self._shape((0, 0, sizes.n_heads, sizes.head_dim))
        q, k, v = (g.op("Reshape", f"{part}.heads", part, heads) for part in (q, k, v))
        q = g.op("Mul", f"{name}.q.scaled", q, self._scale(sizes))
        products = g.op("Mul", f"{name}.products", q, k)
        scores = g.op("ReduceSum", f"{name}.scores", products, self._shape((3,)), keepdims=1)
        weights = g.op("Softmax", f"{name}.weights", scores, axis=1)
        weighted = g.op("Mul", f"{name}.weighted", weights, v)
        mixed = g.op("ReduceSum", f"{name}.mixed", weighted, self._shape((1,)), keepdims=0)
        mixed = g.op("Reshape", f"{name}.joined", mixed, self._shape((-1, sizes.q_size)))
        return self._linear(f"{name}.out", mixed, f"{name}.out.bias")

    def _projector(self, x: str) -> str:
        """(n_windows, hidden) to (n_windows, output_size): down(silu(gate) * up)."""
        g, name = self.graph, "vl_connector.projector"
        both = self._linear(f"{name}.up", x)
        up, gate = g.split(both, [f"{name}.up_half", f"{name}.gate_half"])
        silu = g.op("Mul", f"{name}.silu", gate, g.op("Sigmoid", f"{name}.sigmoid", gate))
        return self._linear(f"{name}.down", g.op("Mul", f"{name}.gated", silu, up))

    def _linear(self, name: str, x: str, bias: str | None = None) -> str:
        """Compute x @ weight.T (+ bias); the weight is stored transposed, as MatMul reads it."""
        return self._linear_parts(name, x, [bias] if bias else [])

    def _linear_parts(self, name: str, x: str, biases: list[str]) -> str:
        """The same with a bias that the checkpoint stores in several parts."""
        g = self.graph
        tensor = self.checkpoint[f"{VISION}{name}.weight"]
        out_size, in_size = tensor.shape
        load = _transposed(tensor.read)
        product = g.op(
            "MatMul",
            f"{name}.product",
            x,
            g.weight(f"{name}.weight_t", (in_size, out_size), load),
        )
        if not biases:
            return product
        parts = [self.checkpoint[f"{VISION}{part}"] for part in biases]
        bias = g.weight(
            f"{name}.bias",
            (out_size,),
            lambda: np.concatenate([part.read() for part in parts]),
        )
        return g.op("Add", f"{name}.sum", product, bias)

    def _norm(self, name: str, x: str) -> str:
        return self.graph.op(
            "LayerNormalization",
            name,
            x,
            self._tensor(f"{name}.weight"),
            self._tensor(f"{name}.bias"),
            axis=-1,
            epsilon=self.vision.norm_eps,
        )

    def _tensor(self, name: str) -> str:
        tensor = self.checkpoint[f"{VISION}{name}"]
        return self.graph.weight(name, tensor.shape, tensor.read)

    def _rows(self, name: str, tokens: list[str]) -> str:
        """Rows of the decoder's token table, always float32: (len(tokens), hidden)."""

        def load() -> Float32:
            rows = []
            for token in (self.special[text] for text in tokens):
                source, row = EMBEDDING, token
                if token >= self.vocab_size:
                    source, row = NEW_EMBEDDING, token - self.vocab_size
                rows.append(self.checkpoint[source].rows(row, row + 1))
            return np.concatenate(rows)

        return self.graph.weight(name, (len(tokens), self.vision.output_size), load, exact=True)

    def _shape(self, values: tuple[int, ...]) -> str:
        """An int64 constant, shared by all nodes that need the same one."""
        name = "ints_" + "_".join(str(value).replace("-", "minus") for value in values)
        return self.graph.constant(name, np.array(values, np.int64))

    def _scale(self, sizes: AttentionSizes) -> str:
        return self.graph.constant(f"scale_{sizes.head_dim}", 1.0 / math.sqrt(sizes.head_dim))


def _transposed(read: Callable[[], Float32]) -> Callable[[], Float32]:
    return lambda: read().T
