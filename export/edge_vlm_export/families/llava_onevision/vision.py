"""LLaVA-OneVision's vision tower and projector: SigLIP without its last norm, and an MLP.

Sources: SigLIP (arXiv 2303.15343), LLaVA-OneVision (arXiv 2408.03326).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_vlm_export.families.llava_like import NEWLINE, VISION, hugging_face_block, projector
from edge_vlm_export.families.vit import PatchEmbedding, Vit, norm_shapes
from edge_vlm_export.graph.architecture import AttentionSizes, Tower

if TYPE_CHECKING:
    from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor
    from edge_vlm_export.families.llava_onevision.config import Config


def vision_tower(config: Config, images: OneVisionImageProcessor) -> Tower:
    """Blocks behind the one that is used are left out."""
    vit = _vit(config, images)
    width = config.text_config.hidden_size
    stages, linears, tensors, unused = vit.parts(config.used_layers)
    connector, products = projector(vit, config.used_layers, width)
    return Tower(
        crop_shape=images.crop_shape,
        stages=(*stages, connector),
        linears=linears | products,
        tensors=tensors | {NEWLINE: (width,)},
        unused=unused | norm_shapes(f"{VISION}post_layernorm", vit.hidden_size),
    )


def _vit(config: Config, images: OneVisionImageProcessor) -> Vit:
    vision = config.vision_config
    n_patches, patch_values = images.crop_shape
    n_heads = vision.num_attention_heads

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
        tensors=hugging_face_block,
    )
