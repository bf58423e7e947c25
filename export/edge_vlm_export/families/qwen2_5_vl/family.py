"""Qwen2.5-VL for the exporter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edge_vlm.errors import CheckpointError
from edge_vlm.families.base import Prompt, Tiles, Tokens, UInt8
from edge_vlm.families.sizes import Vision
from edge_vlm_export.checkpoint.tokenizer import NAMES, Tokenizer, read_byte_level
from edge_vlm_export.families.base import Family
from edge_vlm_export.families.llama_like import LlamaLike, usual_layer
from edge_vlm_export.families.qwen2_5_vl.config import QwenSettings, read_settings
from edge_vlm_export.families.qwen2_5_vl.vision import VISION, vision_tower
from edge_vlm_export.families.settings_files import SETTINGS_FILES

if TYPE_CHECKING:
    from edge_vlm.families.qwen2_5_vl.processor import QwenImageProcessor
    from edge_vlm_export.graph.architecture import Tower

IMAGE = "<|image_pad|>"
# In the order of their ids, from the one that ends a text to the picture's.
_NAMED = (
    *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start"),
    *("box_end", "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad"),
    *("image_pad", "video_pad"),
)
_CONFIGS = Path(__file__).parents[2] / "configs"
SAMPLE_BLOCKS = 15  # a side of what is calibrated with: the last windows are not whole


class Qwen25VL(Family):
    """A tower with windows, a merger and Qwen2.5 with M-RoPE."""

    name = "qwen2.5-vl"
    summary = "a ViT with windows, a merger, Qwen2.5 with M-RoPE"
    model_types = ("qwen2_5_vl",)
    required_files = ("tokenizer.json",)
    optional_files = ("processor_config.json", *SETTINGS_FILES, *NAMES)
    configs: ClassVar[Mapping[str, tuple[Path, ...]]] = {
        name: (_CONFIGS / name,) for name in ("qwen2.5-vl-3b", "qwen2.5-vl-7b")
    }

    def read_settings(self, folder: Path) -> QwenSettings:
        return read_settings(folder)

    def rename(self, stored: str) -> str | None:
        """Released names; newer ones are ``model.visual.`` and ``model.language_model.``."""
        name = stored.removeprefix("model.")
        if name.startswith(VISION) or name.endswith("lm_head.weight"):
            return name.removeprefix("language_model.") if "lm_head" in name else name
        return "model." + name.removeprefix("language_model.").removeprefix("model.")

    def tower(self, settings: QwenSettings) -> Tower:
        return vision_tower(settings.config.vision_config, settings.image_processor)

    def decoder(self, settings: QwenSettings) -> LlamaLike:
        """Qwen2.5: queries, keys and values have biases."""
        return LlamaLike(
            architecture="qwen2vl",
            text=settings.text,
            table={"model.embed_tokens.weight": settings.text.n_ids},
            norm="model.norm.weight",
            head="lm_head.weight",
            head_rows=settings.text.n_ids,
            layer=usual_layer("model.layers.", biases=True),
            sections=settings.sections,
        )

    def read_tokenizer(self, folder: Path, settings: QwenSettings) -> Tokenizer:
        """Qwen2's; nothing is put in front of a prompt."""
        tokenizer = read_byte_level(folder, settings.text.n_ids)
        told = settings.config.image_token_id
        if tokenizer.id_of(IMAGE) != told:
            raise CheckpointError(
                f"{folder / 'config.json'}: image_token_id is {told}, which contradicts the id of"
                f" {IMAGE} in {tokenizer.path.name}: {tokenizer.id_of(IMAGE)}"
            )
        return tokenizer

    def sample(self, pixels: UInt8, processor: QwenImageProcessor) -> Tiles:
        """The middle of a picture, at one size."""
        height, width = pixels.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        most = (SAMPLE_BLOCKS * processor.block_size) ** 2
        square = processor.model_copy(update={"min_pixels": most, "max_pixels": most})
        tiles: Tiles = self.runtime.cut(pixels[top : top + side, left : left + side], square)
        return tiles

    def vision_sizes(self, settings: QwenSettings, precision: str) -> Vision:
        """Of the tower; the merger reads the patches of a block side by side."""
        vision, images = settings.config.vision_config, settings.image_processor
        return Vision(
            precision=precision,
            n_layers=vision.depth,
            hidden_size=vision.hidden_size,
            output_size=vision.out_hidden_size,
            n_heads=vision.num_heads,
            ffn_size=vision.intermediate_size,
            feature_size=vision.hidden_size,
            projector_size=vision.hidden_size * images.block_patches,
        )

    def tokens(self, settings: QwenSettings, tokenizer: Tokenizer) -> Tokens:
        """The picture's, and the others'."""
        return Tokens(
            stop=settings.stop_ids,
            image=tokenizer.special[IMAGE],
            special=tokenizer.special,
        )

    def prompt(self, settings: QwenSettings, tokenizer: Tokenizer) -> Prompt:
        """As the template renders it."""
        return Prompt(image_prompt_token=IMAGE, normalizer=tokenizer.normalizer)

    def made_up_tokens(self, settings: QwenSettings) -> Mapping[str, int]:
        """Those of Qwen2.5, up to the film's."""
        first = settings.config.image_token_id - _NAMED.index("image_pad")
        return {f"<|{name}|>": first + index for index, name in enumerate(_NAMED)}


FAMILY = Qwen25VL()
