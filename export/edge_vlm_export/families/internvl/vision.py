"""InternViT and the projector: a class token, LayerScale, no last norm; pixel shuffle and an MLP.

``vit_features`` (n_crops, 1 + n_patches, hidden_size) is the output of the last block that is used.

Source: "How Far Are We to GPT-4V?" (arXiv 2404.16821).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_vlm_export.families.internvl.config import SHUFFLE
from edge_vlm_export.families.vit import (
    BlockTensors,
    PatchEmbedding,
    Vit,
    block_output,
    linear,
    norm_shapes,
)
from edge_vlm_export.graph.architecture import AttentionSizes, Linear, Move, Stage, Tower

if TYPE_CHECKING:
    from edge_vlm.families.internvl.processor import InternImageProcessor
    from edge_vlm_export.families.internvl.config import Config
    from edge_vlm_export.graph.layers import Layers

PROJECTOR = "multi_modal_projector"  # in the graph and in reports
_PROJECTOR_EPS = 1e-5  # PyTorch's default, not the tower's
_KINDS = ("weight", "bias")


def vision_tower(config: Config, images: InternImageProcessor) -> Tower:
    """Blocks behind the one that is used are left out."""
    vit = _vit(config, images)
    stages, linears, tensors, unused = vit.parts(config.used_layers)
    connector, products, shapes = _projector(config, vit, images)
    return Tower(
        crop_shape=images.crop_shape,
        stages=(*stages, connector),
        linears=linears | products,
        tensors=tensors | shapes,
        unused=unused,
    )


def _vit(config: Config, images: InternImageProcessor) -> Vit:
    vision = config.vision_config
    n_patches, patch_values = images.crop_shape
    n_heads = vision.num_attention_heads
    embedding, patch, class_token, positions = (
        ("vision_model.embeddings.", "patch_embedding", "class_embedding", "position_embedding")
        if config.is_chat
        else (
            "vision_tower.embeddings.",
            "patch_embeddings.projection",
            "cls_token",
            "position_embeddings",
        )
    )
    return Vit(
        n_patches=n_patches,
        patch_values=patch_values,
        n_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        attention=AttentionSizes(n_heads, n_heads, vision.hidden_size // n_heads),
        ffn_size=vision.intermediate_size,
        eps=vision.layer_norm_eps,
        activation=vision.hidden_act,
        embedding=PatchEmbedding(
            weight=f"{embedding}{patch}.weight",
            bias=f"{embedding}{patch}.bias",
            positions=embedding + positions,
            stored=(3, vision.patch_size, vision.patch_size),
            class_token=embedding + class_token,
            ones=1,
        ),
        tensors=_chat_block if config.is_chat else _block,
    )


def _block(layer: int) -> BlockTensors:
    """In transformers' layout."""
    prefix = f"vision_tower.encoder.layer.{layer}."
    weights, biases = (
        tuple(f"{prefix}attention.{part}_proj.{kind}" for part in "qkv") for kind in _KINDS
    )
    return BlockTensors(
        norm1=f"{prefix}layernorm_before",
        qkv=(weights, biases),
        out=f"{prefix}attention.projection_layer",
        norm2=f"{prefix}layernorm_after",
        up=f"{prefix}mlp.fc1",
        down=f"{prefix}mlp.fc2",
        scale1=f"{prefix}lambda_1",
        scale2=f"{prefix}lambda_2",
    )


def _chat_block(layer: int) -> BlockTensors:
    """In the original layout: queries, keys and values are one tensor."""
    prefix = f"vision_model.encoder.layers.{layer}."
    weight, bias = (f"{prefix}attn.qkv.{kind}" for kind in _KINDS)
    return BlockTensors(
        norm1=f"{prefix}norm1",
        qkv=((weight,), (bias,)),
        out=f"{prefix}attn.proj",
        norm2=f"{prefix}norm2",
        up=f"{prefix}mlp.fc1",
        down=f"{prefix}mlp.fc2",
        scale1=f"{prefix}ls1",
        scale2=f"{prefix}ls2",
    )


def _projector(
    config: Config, vit: Vit, images: InternImageProcessor
) -> tuple[Stage, dict[str, Linear], dict[str, tuple[int, ...]]]:
    """linear_2(gelu(linear_1(norm x))), x the patches of a square one behind the other."""
    width, reads = config.text_config.hidden_size, block_output(config.used_layers - 1)
    read = SHUFFLE**2 * vit.hidden_size
    norm, first, second = (f"{PROJECTOR}.{part}" for part in ("layer_norm", "linear_1", "linear_2"))
    tensors = ("mlp1.0", "mlp1.1", "mlp1.3") if config.is_chat else (norm, first, second)

    def add(layers: Layers) -> str:
        g = layers.graph
        x = g.op("Identity", "vit_features", reads)
        g.mark(x, (layers.n_crops, *vit.shape))
        x = _shuffled(layers, x, images.side, vit.hidden_size)
        h = layers.norm(norm, x, tensors[0], _PROJECTOR_EPS)
        h = layers.activation(
            f"{PROJECTOR}.gelu", layers.linear(first, h), config.projector_hidden_act
        )
        return g.op("Identity", "image_features", layers.linear(second, h))

    stage = Stage(
        PROJECTOR,
        (reads,),
        "image_features",
        (images.tokens_per_crop, width),
        (first, second),
        add,
        (Move(norm, (first,), read),),
    )
    linears = {first: linear(width, read, tensors[1]), second: linear(width, width, tensors[2])}
    return stage, linears, norm_shapes(tensors[0], read)


def _shuffled(layers: Layers, x: str, side: int, hidden: int) -> str:
    """Without the class token, each square of patches as one row: its upper ones come first."""
    g, half = layers.graph, side // SHUFFLE
    starts, ends, axis = layers.ints(1), layers.ints(1 + side * side), layers.ints(1)
    x = g.op("Slice", f"{PROJECTOR}.patches", x, starts, ends, axis)
    squares = layers.ints(-1, half, SHUFFLE, half, SHUFFLE, hidden)
    x = g.op("Reshape", f"{PROJECTOR}.squares", x, squares)
    x = g.op("Transpose", f"{PROJECTOR}.shuffled", x, perm=(0, 1, 3, 2, 4, 5))
    rows = layers.ints(-1, half * half, SHUFFLE**2 * hidden)
    return g.op("Reshape", f"{PROJECTOR}.rows", x, rows)
