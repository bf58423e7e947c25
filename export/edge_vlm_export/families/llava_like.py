"""What checkpoints of the LLaVA families have in common: names of tensors, and the projector.

``vit_features`` (n_crops, n_patches, hidden_size) is the output of the last block that is used,
without a class token and before ``post_layernorm``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_vlm.errors import CheckpointError
from edge_vlm.families.sizes import Vision
from edge_vlm_export.checkpoint.tensors import Checkpoint, Values
from edge_vlm_export.checkpoint.tokenizer import TokenType
from edge_vlm_export.families.vit import BlockTensors, Vit, block_output, linear
from edge_vlm_export.graph.architecture import Linear, Move, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from edge_vlm_export.checkpoint.tokenizer import Tokenizer
    from edge_vlm_export.graph.layers import Layers

TEXT = "language_model."
VISION = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector"
NEWLINE = "image_newline"  # of the decoder's width, no token's


def rename(stored: str) -> str | None:
    """Three spellings occur: released, in memory since transformers 4.52, saved by 5.5."""
    name = stored.removeprefix("model.")
    if name.endswith("lm_head.weight"):
        return f"{TEXT}lm_head.weight"
    if name.startswith(TEXT):
        return TEXT + name.removeprefix(TEXT).removeprefix("model.")
    if name.endswith(("embeddings.position_ids", "rotary_emb.inv_freq")):
        return None
    return name


def hugging_face_block(layer: int) -> BlockTensors:
    """The names that SigLIP's and CLIP's towers have in transformers."""
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


def projector(vit: Vit, n_used: int, width: int) -> tuple[Stage, dict[str, Linear]]:
    """linear_2(gelu(linear_1 x)) of the patches: a class token in front of them is left out."""
    reads = block_output(n_used - 1)
    first, second = (f"{PROJECTOR}.linear_{n}" for n in (1, 2))
    n_rows, hidden = vit.shape

    def add(layers: Layers) -> str:
        g = layers.graph
        if n_rows > vit.n_patches:
            begin, end, axis = (layers.ints(n) for n in (n_rows - vit.n_patches, n_rows, 1))
            x = g.op("Slice", "vit_features", reads, begin, end, axis)
        else:
            x = g.op("Identity", "vit_features", reads)
        g.mark(x, (layers.n_crops, vit.n_patches, hidden))
        h = layers.linear(first, layers.smoothed(PROJECTOR, x))
        h = layers.activation(f"{PROJECTOR}.gelu", h, "gelu")
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
    return stage, {first: linear(width, hidden, first), second: linear(width, width, second)}


def mlp_sizes(settings: Any, n_layers: int, precision: str) -> Vision:
    """The manifest's part about a tower of transformers and two products behind it."""
    vision, width = settings.config.vision_config, settings.text.hidden_size
    return Vision(
        precision=precision,
        n_layers=n_layers,
        hidden_size=vision.hidden_size,
        output_size=width,
        n_heads=vision.num_attention_heads,
        ffn_size=vision.intermediate_size,
        feature_size=vision.hidden_size,
        projector_size=width,
    )


def newline_marker(tensors: Checkpoint) -> Values:
    """The vector behind each row of a grid, as ``Family.markers`` has it."""
    newline = tensors.values(NEWLINE)
    return Values((1, *newline.shape), lambda: iter([newline.read()[None]]))


def check_image_token(tokenizer: Tokenizer, text: str, token: int, config_path: Path) -> None:
    """The image's token is that of the config, and no text is an id behind it.

    Raises:
        CheckpointError: they differ.
    """
    found = tokenizer.id_of(text)
    if found != token:
        raise CheckpointError(
            f"{config_path}: image_token_index is {token}, which contradicts the id of {text} in"
            f" {tokenizer.path.name}: {found}"
        )
    for behind, kind in enumerate(tokenizer.types[token:], token):
        if kind is TokenType.NORMAL:
            raise CheckpointError(
                f"{tokenizer.path}: token {behind} lies behind {text}, from which on no id is that"
                " of an answer"
            )
