"""CLIP, two products and a Llama: what LLaVA-1.5 and LLaVA-NeXT are made of.

Sources: CLIP (arXiv 2103.00020), LLaVA-1.5 (arXiv 2310.03744).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edge_vlm.families.base import Prompt, SentencePiecePrompt, Tokens
from edge_vlm_export.checkpoint.sentencepiece import read_sentencepiece
from edge_vlm_export.checkpoint.tokenizer import NAMES, Tokenizer
from edge_vlm_export.families.base import Family
from edge_vlm_export.families.llama_like import LlamaLike, usual_layer
from edge_vlm_export.families.llava_like import (
    TEXT,
    VISION,
    check_image_token,
    hugging_face_block,
    mlp_sizes,
    projector,
    rename,
)
from edge_vlm_export.families.settings_files import SETTINGS_FILES
from edge_vlm_export.families.vit import PatchEmbedding, Vit, norm_shapes
from edge_vlm_export.graph.architecture import AttentionSizes, Tower

if TYPE_CHECKING:
    from edge_vlm.families.llava_like import PatchProcessor
    from edge_vlm.families.sizes import Vision
    from edge_vlm_export.families.llava.settings import ClipLlamaConfig


class ClipLlama(Family):
    """CLIP, two products and a Llama with a SentencePiece tokenizer.

    Settings have, besides those of all: ``config``, ``text`` and ``image_token``.
    """

    required_files = ("tokenizer.json",)
    optional_files = ("processor_config.json", *SETTINGS_FILES, *NAMES)
    newline: ClassVar[str | None] = None  # a tensor of the decoder's width, which no token has

    def rename(self, stored: str) -> str | None:
        return rename(stored)

    def tower(self, settings: Any) -> Tower:
        return clip_tower(settings.config, settings.image_processor, self.newline)

    def decoder(self, settings: Any) -> LlamaLike:
        """No biases; llama.cpp rotates neighbours."""
        return LlamaLike(
            architecture="llama",
            text=settings.text,
            table={f"{TEXT}embed_tokens.weight": settings.text.n_ids},
            norm=f"{TEXT}norm.weight",
            head=f"{TEXT}lm_head.weight",
            head_rows=settings.text.n_ids,
            layer=usual_layer(f"{TEXT}layers."),
            interleaved=True,
        )

    def read_tokenizer(self, folder: Path, settings: Any) -> Tokenizer:
        """Llama's."""
        tokenizer = read_sentencepiece(folder, settings.text.n_ids, settings.chat_template)
        token = settings.config.image_token_id
        check_image_token(tokenizer, settings.image_token, token, folder / "config.json")
        return tokenizer

    def vision_sizes(self, settings: Any, precision: str) -> Vision:
        """Of the blocks that are used."""
        return mlp_sizes(settings, settings.config.used_layers, precision)

    def tokens(self, settings: Any, tokenizer: Tokenizer) -> Tokens:
        """The picture's, and the others'."""
        return Tokens(
            bos=tokenizer.bos,
            stop=settings.stop_ids,
            image=tokenizer.special[settings.image_token],
            special=tokenizer.special,
        )

    def prompt(self, settings: Any, tokenizer: Tokenizer) -> Prompt:
        """As the template renders it."""
        return SentencePiecePrompt(
            image_prompt_token=settings.image_token, normalizer=tokenizer.normalizer
        )


def clip_tower(config: ClipLlamaConfig, images: PatchProcessor, newline: str | None) -> Tower:
    """Blocks behind the one that is used are left out, and so is the norm behind the last."""
    vision, prefix = config.vision_config, f"{VISION}embeddings."
    n_patches, patch_values = images.crop_shape
    n_heads, width = vision.num_attention_heads, config.text_config.hidden_size
    vit = Vit(
        n_patches=n_patches,
        patch_values=patch_values,
        n_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        attention=AttentionSizes(n_heads, n_heads, vision.hidden_size // n_heads),
        ffn_size=vision.intermediate_size,
        eps=vision.layer_norm_eps,
        activation=vision.hidden_act,
        embedding=PatchEmbedding(
            weight=f"{prefix}patch_embedding.weight",
            positions=f"{prefix}position_embedding.weight",
            stored=(3, vision.patch_size, vision.patch_size),
            class_token=f"{prefix}class_embedding",
            norm=f"{VISION}pre_layrnorm",  # spelled so
        ),
        tensors=hugging_face_block,
    )
    stages, linears, tensors, unused = vit.parts(config.used_layers)
    connector, products = projector(vit, config.used_layers, width)
    return Tower(
        crop_shape=images.crop_shape,
        stages=(*stages, connector),
        linears=linears | products,
        tensors=tensors | ({newline: (width,)} if newline else {}),
        unused=unused | norm_shapes(f"{VISION}post_layernorm", vit.hidden_size),
    )
