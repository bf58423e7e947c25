"""LLaVA-OneVision's vision tower and projector: SigLIP without its last norm, and an MLP.

``vit_features`` (n_crops, n_patches, hidden_size) is the output of the last block that is used,
before ``post_layernorm``.

Sources: SigLIP (arXiv 2303.15343), LLaVA-OneVision (arXiv 2408.03326).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor
    from edge_vlm_export.families.llava_onevision.config import Config
    from edge_vlm_export.graph.layers import Layers

VISION = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector"
NEWLINE = "image_newline"


def vision_tower(config: Config, images: OneVisionImageProcessor) -> Tower:
    """Blocks behind the one that is used are left out."""
    vit = _vit(config, images)
    stages, linears, tensors, unused = vit.parts(config.used_layers)
    connector, products = _projector(config, vit, config.used_layers)
    return Tower(
        crop_shape=images.crop_shape,
        stages=(*stages, connector),
        linears=linears | products,
        tensors=tensors | {NEWLINE: (config.text_config.hidden_size,)},
        unused=unused | norm_shapes(f"{VISION}post_layernorm", vit.hidden_size),
    )


def _vit(config: Config, images: OneVisionImageProcessor) -> Vit:
    vision = config.vision_config
    n_patches, patch_values = images.crop_shape
    n_heads = vision.num_attention_heads

    def block(layer: int) -> BlockTensors:
        prefix = f"{VISION}encoder.layers.{layer}."
        weights, biases = (
            tuple(f"{prefix}self_attn.{part}_proj.{kind}" for part in "qkv")
            for kind in ("weight", "bias")
        )
        return BlockTensors(
            norm1=f"{prefix}layer_norm1",
            qkv=(weights, biases),
            out=f"{prefix}self_attn.out_proj",
            norm2=f"{prefix}layer_norm2",
            up=f"{prefix}mlp.fc1",
            down=f"{prefix}mlp.fc2",
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
            weight=f"{VISION}embeddings.patch_embedding.weight",
            bias=f"{VISION}embeddings.patch_embedding.bias",
            positions=f"{VISION}embeddings.position_embedding.weight",
            stored=(3, vision.patch_size, vision.patch_size),
        ),
        tensors=block,
    )


def _projector(config: Config, vit: Vit, n_used: int) -> tuple[Stage, dict[str, Linear]]:
    """linear_2(gelu(linear_1 x))."""
    width, reads = config.text_config.hidden_size, block_output(n_used - 1)
    first, second = (f"{PROJECTOR}.linear_{n}" for n in (1, 2))

    def add(layers: Layers) -> str:
        g = layers.graph
        x = g.op("Identity", "vit_features", reads)
        g.mark(x, (layers.n_crops, *vit.shape))
        h = layers.linear(first, layers.smoothed(PROJECTOR, x))
        h = layers.activation(f"{PROJECTOR}.gelu", h, config.projector_hidden_act)
        return g.op("Identity", "image_features", layers.linear(second, h))

    stage = Stage(
        PROJECTOR,
        (reads,),
        "image_features",
        (vit.n_patches, width),
        (first, second),
        add,
        (Move(PROJECTOR, (first,)),),
    )
    linears = {first: linear(width, vit.hidden_size, first), second: linear(width, width, second)}
    return stage, linears
