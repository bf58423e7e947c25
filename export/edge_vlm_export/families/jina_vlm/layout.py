"""Names and shapes of a checkpoint's tensors, as its config determines them.

Two orders matter and cannot be seen from a shape: every ``qkv_w`` holds Q, K and V rows in this
order, and every gated ``up`` holds [up; gate], to be combined as ``down(silu(gate) * up)``.
"""

from __future__ import annotations

from edge_vlm.errors import CheckpointError
from edge_vlm.families.jina_vlm.processor import JinaImageProcessor as ImageProcessor
from edge_vlm_export.checkpoint.tensors import Checkpoint, Shape
from edge_vlm_export.families.jina_vlm.config import Settings, TextSettings, VisionSettings

VISION = "model.vision_model."
TEXT = "model.language_model."
HEAD = "lm_head.weight"
EMBEDDING = f"{TEXT}embedding.embedding"
NEW_EMBEDDING = f"{TEXT}embedding.new_embedding"
TEXT_BIASES = ("q_b", "k_b", "v_b")  # stored by the published code, and zero


def check_tensors(checkpoint: Checkpoint, settings: Settings) -> bool:
    """Compare a checkpoint's tensors with its settings; returns whether the head is tied.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape, or the presence of
            an output head contradicts the config.
    """
    tied = HEAD not in checkpoint
    told = [level for level in settings.tie_word_embeddings if level is not None]
    if told and tied not in told:
        presence = "has no" if tied else "has a"
        raise CheckpointError(
            f"{checkpoint.where}: {presence} tensor {HEAD}, but tie_word_embeddings in"
            f" config.json is {'false' if tied else 'true'}"
        )
    text, vision = settings.text, settings.vision
    required = text_shapes(text) | vision_shapes(vision, settings.image_processor)
    if not tied:
        required[HEAD] = (text.vocab_size, text.hidden_size)
    optional = dead_vision_shapes(vision) | text_bias_shapes(text)
    checkpoint.check(required, optional)
    for name in text_bias_shapes(text):
        if name in checkpoint and checkpoint[name].read().any():
            raise CheckpointError(
                f"{checkpoint[name].path}: tensor {name} is not zero; biases in the language"
                " model's attention are not supported"
            )
    return tied


def vision_shapes(vision: VisionSettings, images: ImageProcessor) -> dict[str, Shape]:
    """Tensors of the vision tower and connector that the outputs depend on."""
    hidden = vision.hidden_size
    shapes: dict[str, Shape] = {
        f"{VISION}patch_embed.proj.weight": (hidden, images.patch_values),
        f"{VISION}patch_embed.proj.bias": (hidden,),
        f"{VISION}pos_embed": (images.n_patches, hidden),
    }
    for layer in range(vision.n_used_layers):
        shapes |= _vision_layer(vision, layer)
    if vision.uses_final_norm:
        shapes |= _vision_norm(vision, f"{VISION}post_lnorm")
    features = vision.feature_size
    pooled = vision.pooling_attention.q_size
    pooling = f"{VISION}vl_connector.pooling."
    projector = f"{VISION}vl_connector.projector."
    return shapes | {
        f"{VISION}vl_connector.pad_embed": (2, features),
        f"{pooling}q_w.weight": (pooled, features),
        f"{pooling}kv_w.weight": (2 * pooled, features),
        f"{pooling}q_b": (pooled,),
        f"{pooling}k_b": (pooled,),
        f"{pooling}v_b": (pooled,),
        f"{pooling}out.weight": (hidden, pooled),
        f"{pooling}out.bias": (hidden,),
        f"{projector}up.weight": (2 * vision.projector_size, hidden),
        f"{projector}down.weight": (vision.output_size, vision.projector_size),
    }


def dead_vision_shapes(vision: VisionSettings) -> dict[str, Shape]:
    """Tensors behind the last used hidden state, which the bundle leaves out."""
    shapes = {} if vision.uses_final_norm else _vision_norm(vision, f"{VISION}post_lnorm")
    for layer in range(vision.n_used_layers, vision.n_layers):
        shapes |= _vision_layer(vision, layer)
    return shapes


def text_shapes(text: TextSettings) -> dict[str, Shape]:
    """Tensors of the language model, the output head aside."""
    hidden, heads = text.hidden_size, text.attention
    shapes: dict[str, Shape] = {
        EMBEDDING: (text.vocab_size, hidden),
        NEW_EMBEDDING: (text.additional_vocab_size, hidden),
        f"{TEXT}ln_f.weight": (hidden,),
    }
    for layer in range(text.n_layers):
        prefix = f"{TEXT}layers.{layer}."
        shapes |= {
            f"{prefix}attn_lnorm.weight": (hidden,),
            f"{prefix}attn.qkv_w.weight": (heads.q_size + 2 * heads.kv_size, hidden),
            f"{prefix}attn.q_lnorm.weight": (heads.head_dim,),
            f"{prefix}attn.k_lnorm.weight": (heads.head_dim,),
            f"{prefix}attn.out.weight": (hidden, heads.q_size),
            f"{prefix}ffn_lnorm.weight": (hidden,),
            f"{prefix}ffn.up.weight": (2 * text.ffn_size, hidden),
            f"{prefix}ffn.down.weight": (hidden, text.ffn_size),
        }
    return shapes


def text_bias_shapes(text: TextSettings) -> dict[str, Shape]:
    """The attention biases of the language model, which may be stored but have to be zero."""
    heads = text.attention
    sizes = dict(zip(TEXT_BIASES, (heads.q_size, heads.kv_size, heads.kv_size), strict=True))
    return {
        f"{TEXT}layers.{layer}.attn.{name}": (size,)
        for layer in range(text.n_layers)
        for name, size in sizes.items()
    }


def _vision_layer(vision: VisionSettings, layer: int) -> dict[str, Shape]:
    hidden, width = vision.hidden_size, vision.attention.q_size
    prefix = f"{VISION}layers.{layer}."
    return {
        **_vision_norm(vision, f"{prefix}attn_lnorm"),
        f"{prefix}attn.qkv_w.weight": (3 * width, hidden),
        f"{prefix}attn.q_b": (width,),
        f"{prefix}attn.k_b": (width,),
        f"{prefix}attn.v_b": (width,),
        f"{prefix}attn.out.weight": (hidden, width),
        f"{prefix}attn.out.bias": (hidden,),
        **_vision_norm(vision, f"{prefix}ffn_lnorm"),
        f"{prefix}ffn.up.weight": (vision.ffn_size, hidden),
        f"{prefix}ffn.up.bias": (vision.ffn_size,),
        f"{prefix}ffn.down.weight": (hidden, vision.ffn_size),
        f"{prefix}ffn.down.bias": (hidden,),
    }


def _vision_norm(vision: VisionSettings, name: str) -> dict[str, Shape]:
    return {f"{name}.weight": (vision.hidden_size,), f"{name}.bias": (vision.hidden_size,)}
