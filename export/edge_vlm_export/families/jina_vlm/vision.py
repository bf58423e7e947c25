"""jina-vlm's vision tower and connector.

Inputs besides the crops: ``is_last`` bool (n_crops,), true for the crop whose patches all get
``pad_embed[1]``. ``vit_features`` (n_crops, n_patches, feature_size) are the used hidden states
side by side, after blank crops were zeroed.

Sources: SigLIP 2 (arXiv 2502.14786) for the tower, "jina-vlm" (arXiv 2512.04032) and Molmo (arXiv
2409.17146) for the connector. ``kv_w`` holds K and V rows in this order, and the projector's ``up``
holds [up; gate].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_vlm_export.families.vit import (
    BlockNames,
    BlockTensors,
    PatchEmbedding,
    Vit,
    block_output,
    linear,
    norm_shapes,
)
from edge_vlm_export.graph.architecture import CROPS, Linear, Move, Stage, Tower

if TYPE_CHECKING:
    from edge_vlm.families.jina_vlm.tiling import JinaImageProcessor
    from edge_vlm_export.families.jina_vlm.config import VisionSettings
    from edge_vlm_export.graph.layers import Layers

VISION = "model.vision_model."
_CONNECTOR = "vl_connector"
_POOLING, _PROJECTOR = f"{_CONNECTOR}.pooling", f"{_CONNECTOR}.projector"
_NAMES = BlockNames(
    norm1="attn_lnorm",
    qkv="attn.qkv_w",
    norm2="ffn_lnorm",
    up="ffn.up",
    activation="ffn.gelu",
    down="ffn.down",
)


def vision_tower(vision: VisionSettings, images: JinaImageProcessor) -> Tower:
    """Blocks behind the last used hidden state are left out."""
    connector = Connector(vision, images)
    stages, linears, tensors, unused = _vit(vision, images).parts(vision.n_used_layers)
    final = norm_shapes(f"{VISION}post_lnorm", vision.hidden_size)
    (tensors if vision.uses_final_norm else unused).update(final)
    return Tower(
        crop_shape=images.crop_shape,
        stages=(*stages, connector.stage()),
        linears=linears | connector.linears(),
        tensors=tensors | {f"{VISION}{_CONNECTOR}.pad_embed": (2, vision.feature_size)},
        unused=unused,
    )


def _vit(vision: VisionSettings, images: JinaImageProcessor) -> Vit:
    def block(layer: int) -> BlockTensors:
        prefix = f"{VISION}layers.{layer}."
        biases = tuple(f"{prefix}attn.{part}_b" for part in "qkv")
        return BlockTensors(
            norm1=f"{prefix}attn_lnorm",
            qkv=((f"{prefix}attn.qkv_w.weight",), biases),
            out=f"{prefix}attn.out",
            norm2=f"{prefix}ffn_lnorm",
            up=f"{prefix}ffn.up",
            down=f"{prefix}ffn.down",
        )

    return Vit(
        n_patches=images.n_patches,
        patch_values=images.patch_values,
        n_layers=vision.n_layers,
        hidden_size=vision.hidden_size,
        attention=vision.attention,
        ffn_size=vision.ffn_size,
        eps=vision.norm_eps,
        activation="gelu_pytorch_tanh",
        embedding=PatchEmbedding(
            weight=f"{VISION}patch_embed.proj.weight",
            bias=f"{VISION}patch_embed.proj.bias",
            positions=f"{VISION}pos_embed",
            product="patch_embed.proj",
            table="pos_embed",
        ),
        tensors=block,
        names=_NAMES,
    )


class Connector:
    """From hidden states to decoder-ready vectors: windows of patches, attention, gated MLP."""

    def __init__(self, vision: VisionSettings, images: JinaImageProcessor) -> None:
        self.vision, self.images = vision, images

    def linears(self) -> dict[str, Linear]:
        """The products, in the order of computation."""
        vision, features = self.vision, self.vision.feature_size
        pooled, projected = vision.pooling_attention.q_size, vision.projector_size
        pooling, projector = f"{VISION}{_POOLING}.", f"{VISION}{_PROJECTOR}."
        kv_biases = f"{pooling}k_b", f"{pooling}v_b"
        return {
            f"{_POOLING}.q_w": Linear(
                pooled, features, (f"{pooling}q_w.weight",), (f"{pooling}q_b",)
            ),
            f"{_POOLING}.kv_w": Linear(2 * pooled, features, (f"{pooling}kv_w.weight",), kv_biases),
            f"{_POOLING}.out": linear(vision.hidden_size, pooled, f"{pooling}out"),
            f"{_PROJECTOR}.up": Linear(
                2 * projected, vision.hidden_size, (f"{projector}up.weight",)
            ),
            f"{_PROJECTOR}.down": Linear(
                vision.output_size, projected, (f"{projector}down.weight",)
            ),
        }

    def stage(self) -> Stage:
        """The used hidden states to ``image_features``."""
        vision = self.vision
        pooled, projected = vision.pooling_attention.q_size, vision.projector_size
        moves = (
            Move(_CONNECTOR, (f"{_POOLING}.kv_w", f"{_POOLING}.q_w")),
            Move(f"{_POOLING}.kv_w", (f"{_POOLING}.out",), 2 * pooled, (pooled, None)),
            Move(f"{_POOLING}.out", (f"{_PROJECTOR}.up",), vision.hidden_size),
            Move(f"{_PROJECTOR}.up", (f"{_PROJECTOR}.down",), 2 * projected, (0, projected)),
        )
        blocks = {min(index, vision.n_layers - 1) for index in vision.used_states}
        return Stage(
            "connector",
            (*map(block_output, sorted(blocks)), CROPS, "is_last"),
            "image_features",
            (self.images.tokens_per_crop, vision.output_size),
            tuple(self.linears()),
            self._add,
            moves,
        )

    def _add(self, layers: Layers) -> str:
        features = self._mark_blank(layers, self._states(layers))
        shape = (layers.n_crops, self.images.n_patches, self.vision.feature_size)
        layers.graph.mark(features, shape)
        windows = self._windows(layers, self._padded(layers, features))
        x = self._projector(layers, self._pool(layers, windows))
        shape_out = layers.ints(-1, self.images.tokens_per_crop, self.vision.output_size)
        return layers.graph.op("Reshape", "image_features", x, shape_out)

    def _states(self, layers: Layers) -> str:
        """The used hidden states side by side: (n_crops, n_patches, feature_size)."""
        vision, n_layers = self.vision, self.vision.n_layers
        names = {index: block_output(index) for index in vision.used_states if index < n_layers}
        if vision.uses_final_norm:
            last, tensor = block_output(n_layers - 1), f"{VISION}post_lnorm"
            names[n_layers] = layers.norm("post_lnorm", last, tensor, vision.norm_eps)
        used = [names[index] for index in vision.used_states]
        return layers.graph.op("Concat", "states", *used, axis=-1)

    def _mark_blank(self, layers: Layers, states: str) -> str:
        """Zero the features of crops that are black throughout: every value exactly -1."""
        g = layers.graph
        axes, black = layers.ints(1, 2), g.constant("black", -1.0)
        extremes = []
        for kind in ("Max", "Min"):
            extreme = g.op(f"Reduce{kind}", f"crops.{kind}", CROPS, axes)
            extremes.append(g.op("Equal", f"{kind}.is_black", extreme, black))
        blank = g.op("And", "is_blank", *extremes)  # (n_crops, 1, 1)
        keep = layers.floats("is_not_blank", g.op("Not", "not_blank", blank))
        return g.op("Mul", "vit_features", states, keep)

    def _padded(self, layers: Layers, features: str) -> str:
        """The last crop's patches get a vector of their own; see ``Move`` for the rest."""
        g = layers.graph
        is_last = layers.floats("is_last.float", "is_last")
        is_last = g.op("Reshape", "is_last.column", is_last, layers.ints(-1, 1, 1))
        pad_embed = layers.tensors.values(f"{VISION}{_CONNECTOR}.pad_embed", 1, 2)
        pad = layers.matrix(f"{_CONNECTOR}.pad_embed.1", pad_embed)
        x = g.op("Add", "padded_features", features, g.op("Mul", "pad", is_last, pad))
        return layers.smoothed(_CONNECTOR, x)

    def _windows(self, layers: Layers, x: str) -> str:
        """(n_crops, n_patches, feature_size) to (n_windows, patches, feature_size)."""
        g, images, size = layers.graph, self.images, self.vision.feature_size
        rows, columns = images.patches_hw
        out_rows, out_columns = images.token_length_h, images.token_length_w
        pool_h, pool_w = images.pooling_h, images.pooling_w
        extra = (out_rows * pool_h - rows, out_columns * pool_w - columns)
        x = g.op("Reshape", "grid", x, layers.ints(0, rows, columns, size))
        if any(extra):
            x = g.op("Pad", "grid.padded", x, layers.ints(0, 0, 0, 0, 0, *extra, 0))
        split = layers.ints(0, out_rows, pool_h, out_columns, pool_w, size)
        x = g.op("Reshape", "grid.split", x, split)
        x = g.op("Transpose", "grid.windows", x, perm=(0, 1, 3, 2, 4, 5))
        return g.op("Reshape", "windows", x, layers.ints(-1, pool_h * pool_w, size))

    def _pool(self, layers: Layers, windows: str) -> str:
        """(n_windows, patches, feature_size) to (n_windows, hidden): the mean attends to them.

        With one query and a handful of keys, products and sums beat batched matrix products.
        """
        g, sizes, name = layers.graph, self.vision.pooling_attention, _POOLING
        query = g.op("ReduceMean", f"{name}.query", windows, layers.ints(1), keepdims=1)
        q = layers.linear(f"{name}.q_w", query)
        k, v = layers.linear.parts(f"{name}.kv_w", windows, [f"{name}.k", f"{name}.v"])
        heads = layers.ints(0, 0, sizes.n_heads, sizes.head_dim)
        q, k, v = (g.op("Reshape", f"{part}.heads", part, heads) for part in (q, k, v))
        q = g.op("Mul", f"{name}.q.scaled", q, layers.head_scale(sizes))
        products = g.op("Mul", f"{name}.products", q, k)
        scores = g.op("ReduceSum", f"{name}.scores", products, layers.ints(3), keepdims=1)
        weights = g.op("Softmax", f"{name}.weights", scores, axis=1)
        weighted = g.op("Mul", f"{name}.weighted", weights, v)
        mixed = g.op("ReduceSum", f"{name}.mixed", weighted, layers.ints(1), keepdims=0)
        mixed = g.op("Reshape", f"{name}.joined", mixed, layers.ints(-1, sizes.q_size))
        return layers.linear(f"{name}.out", mixed)

    def _projector(self, layers: Layers, x: str) -> str:
        """(n_windows, hidden) to (n_windows, output_size): down(silu(gate) * up)."""
        g, name = layers.graph, _PROJECTOR
        halves = [f"{name}.up_half", f"{name}.gate_half"]
        up, gate = layers.linear.parts(f"{name}.up", x, halves)
        silu = g.op("Mul", f"{name}.silu", gate, g.op("Sigmoid", f"{name}.sigmoid", gate))
        return layers.linear(f"{name}.down", g.op("Mul", f"{name}.gated", silu, up))
