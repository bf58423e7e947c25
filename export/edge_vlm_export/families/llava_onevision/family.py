"""LLaVA-OneVision for the exporter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.families.base import Prompt, Tokens
from edge_vlm_export.checkpoint.tokenizer import NAMES, Tokenizer, read_byte_level
from edge_vlm_export.families.base import Family
from edge_vlm_export.families.llama_like import LlamaLike, usual_layer
from edge_vlm_export.families.llava_like import (
    TEXT,
    check_image_token,
    mlp_sizes,
    newline_marker,
    rename,
)
from edge_vlm_export.families.llava_onevision.config import OneVisionSettings, read_settings
from edge_vlm_export.families.llava_onevision.vision import vision_tower
from edge_vlm_export.families.settings_files import SETTINGS_FILES

if TYPE_CHECKING:
    from edge_vlm.families.sizes import Vision
    from edge_vlm_export.checkpoint.tensors import Checkpoint, Values
    from edge_vlm_export.graph.architecture import Tower


class LlavaOneVision(Family):
    """SigLIP, an MLP and Qwen2."""

    name = "llava-onevision"
    summary = "SigLIP, an MLP, Qwen2"
    model_types = ("llava_onevision",)
    required_files = ("tokenizer.json",)
    optional_files = ("processor_config.json", *SETTINGS_FILES, *NAMES)

    def read_settings(self, folder: Path) -> OneVisionSettings:
        return read_settings(folder)

    def rename(self, stored: str) -> str | None:
        return rename(stored)

    def tower(self, settings: OneVisionSettings) -> Tower:
        return vision_tower(settings.config, settings.image_processor)

    def decoder(self, settings: OneVisionSettings) -> LlamaLike:
        """Qwen2: queries, keys and values have biases."""
        return LlamaLike(
            architecture="qwen2",
            text=settings.text,
            table={f"{TEXT}embed_tokens.weight": settings.text.n_ids},
            norm=f"{TEXT}norm.weight",
            head=f"{TEXT}lm_head.weight",
            head_rows=settings.text.n_ids,
            layer=usual_layer(f"{TEXT}layers.", biases=True),
        )

    def markers(
        self, settings: OneVisionSettings, tokenizer: Tokenizer, tensors: Checkpoint
    ) -> Values:
        """The vector behind each row, which is no token's."""
        return newline_marker(tensors)

    def read_tokenizer(self, folder: Path, settings: OneVisionSettings) -> Tokenizer:
        """Qwen2's; nothing is put in front of a prompt."""
        tokenizer = read_byte_level(folder, settings.text.n_ids)
        token = settings.config.image_token_id
        check_image_token(tokenizer, settings.image_token, token, folder / "config.json")
        return tokenizer

    def vision_sizes(self, settings: OneVisionSettings, precision: str) -> Vision:
        """Of the blocks that are used."""
        return mlp_sizes(settings, settings.config.used_layers, precision)

    def tokens(self, settings: OneVisionSettings, tokenizer: Tokenizer) -> Tokens:
        """The picture's, and the others'."""
        return Tokens(
            stop=settings.stop_ids,
            image=tokenizer.special[settings.image_token],
            special=tokenizer.special,
        )

    def prompt(self, settings: OneVisionSettings, tokenizer: Tokenizer) -> Prompt:
        """As the template renders it."""
        return Prompt(image_prompt_token=settings.image_token, normalizer=tokenizer.normalizer)


FAMILY = LlavaOneVision()
