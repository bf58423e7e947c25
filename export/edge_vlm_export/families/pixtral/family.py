"""Pixtral for the exporter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import CheckpointError
from edge_vlm.families.pixtral.prompt import PixtralPrompt, PixtralTokens
from edge_vlm.families.resample import resize_bicubic
from edge_vlm_export.checkpoint.config_file import check_same
from edge_vlm_export.checkpoint.tokenizer import NAMES, Tokenizer, named_token, read_byte_level
from edge_vlm_export.families.base import Family
from edge_vlm_export.families.llama_like import LlamaLike, usual_layer
from edge_vlm_export.families.llava_like import mlp_sizes
from edge_vlm_export.families.pixtral.config import PixtralSettings, read_settings
from edge_vlm_export.families.pixtral.vision import vision_tower
from edge_vlm_export.families.settings_files import PROCESSOR, SETTINGS_FILES

if TYPE_CHECKING:
    from edge_vlm.families.base import Tiles, UInt8
    from edge_vlm.families.pixtral.processor import PixtralImageProcessor
    from edge_vlm.families.sizes import Vision
    from edge_vlm_export.checkpoint.tensors import Checkpoint, Values
    from edge_vlm_export.graph.architecture import Tower

TEXT = "language_model."


class Pixtral(Family):
    """A ViT with rotary positions, an MLP and Mistral."""

    name = "pixtral"
    summary = "a ViT with rotary positions, an MLP, Mistral"
    model_types = ("llava",)
    required_files = ("tokenizer.json",)
    optional_files = (PROCESSOR, *SETTINGS_FILES, *NAMES)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """LLaVA-1.5 has the same model_type."""
        vision = config.get("vision_config")
        kind = vision.get("model_type") if isinstance(vision, dict) else None
        return super().recognises(config) and kind == "pixtral"

    def read_settings(self, folder: Path) -> PixtralSettings:
        return read_settings(folder)

    def rename(self, stored: str) -> str | None:
        """Three spellings occur: released, in memory since transformers 4.52, saved by 5.5."""
        name = stored.removeprefix("model.")
        if name.endswith("lm_head.weight"):
            return f"{TEXT}lm_head.weight"
        if name.startswith(TEXT):
            return TEXT + name.removeprefix(TEXT).removeprefix("model.")
        return name

    def tower(self, settings: PixtralSettings) -> Tower:
        return vision_tower(settings.config, settings.image_processor)

    def decoder(self, settings: PixtralSettings) -> LlamaLike:
        """Mistral: no biases; llama.cpp rotates neighbours."""
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

    def markers(
        self, settings: PixtralSettings, tokenizer: Tokenizer, tensors: Checkpoint
    ) -> Values:
        """The decoder's rows of what stands behind a row of patches, and behind the last."""
        processor = settings.processor
        texts = processor.image_break_token, processor.image_end_token
        return self.decoder(settings).rows(tensors, [tokenizer.special[text] for text in texts])

    def read_tokenizer(self, folder: Path, settings: PixtralSettings) -> Tokenizer:
        """Byte-level; the template puts the first token in front of a prompt."""
        tokenizer = read_byte_level(folder, settings.text.n_ids)
        processor = settings.processor
        for text in (processor.image_break_token, processor.image_end_token):
            tokenizer.id_of(text)
        check_same(
            folder / "config.json",
            "image_token_index",
            settings.config.image_token_id,
            tokenizer.id_of(processor.image_token),
            f"the id of {processor.image_token} in {tokenizer.path.name}",
        )
        return tokenizer

    def sample(self, pixels: UInt8, processor: PixtralImageProcessor) -> Tiles:
        """The middle of a picture, as large as a tile."""
        height, width = pixels.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        edge = min(processor.tile_hw[0], processor.longest_edge)
        square = resize_bicubic(pixels[top : top + side, left : left + side], edge, edge)
        tiles: Tiles = self.runtime.cut(square, processor)
        return tiles

    def vision_sizes(self, settings: PixtralSettings, precision: str) -> Vision:
        """Of the tower."""
        n_layers = settings.config.vision_config.num_hidden_layers
        return mlp_sizes(settings, n_layers, precision)

    def tokens(self, settings: PixtralSettings, tokenizer: Tokenizer) -> PixtralTokens:
        """The picture's, and the others'."""
        special, processor = tokenizer.special, settings.processor
        return PixtralTokens(
            stop=settings.stop_ids,
            image=special[processor.image_token],
            image_break=special[processor.image_break_token],
            image_end=special[processor.image_end_token],
            special=special,
        )

    def prompt(self, settings: PixtralSettings, tokenizer: Tokenizer) -> PixtralPrompt:
        """As the template renders it, with the tokens that the tokenizer's files name."""
        folder, special = tokenizer.path.parent, tokenizer.special
        texts = {token: text for text, token in special.items()}
        told = {}
        for role in ("bos_token", "eos_token"):
            token = named_token(folder, special, role)
            if token is None:
                raise CheckpointError(
                    f"{folder}: neither {' nor '.join(NAMES)} names a {role}, which the chat"
                    " template needs"
                )
            told[role] = texts[token]
        return PixtralPrompt(
            image_prompt_token=settings.processor.image_token,
            normalizer=tokenizer.normalizer,
            bos_token=told["bos_token"],
            eos_token=told["eos_token"],
        )


FAMILY = Pixtral()
