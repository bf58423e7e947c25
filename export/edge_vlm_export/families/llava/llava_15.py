"""LLaVA-1.5 for the exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from edge_vlm.families.llava.crop import Llava15ImageProcessor
from edge_vlm_export.checkpoint.config_file import Off, read_part
from edge_vlm_export.families.base import Settings
from edge_vlm_export.families.llava.family import ClipLlama
from edge_vlm_export.families.llava.pictures import (
    Preprocessor,
    images_of,
    read_processor,
)
from edge_vlm_export.families.llava.settings import ClipLlamaConfig, stop_ids
from edge_vlm_export.families.settings_files import read_chat_template, read_images

if TYPE_CHECKING:
    from edge_vlm_export.families.llama_like import TextSettings


class Config(ClipLlamaConfig):
    """``config.json``."""

    model_type: Literal["llava"]


class CropPreprocessor(Preprocessor):
    """``preprocessor_config.json``."""

    image_processor_type: Annotated[
        str, Field(pattern="^(CLIP|Llava)ImageProcessor(Fast|Pil)?$")
    ] = "CLIPImageProcessor"
    do_pad: Off = False


@dataclass(frozen=True)
class Llava15Settings(Settings):
    """Everything the settings files of a checkpoint say."""

    image_processor: Llava15ImageProcessor
    config: Config
    text: TextSettings
    image_token: str


class Llava15(ClipLlama):
    """The middle square of a picture; Llama."""

    name = "llava-1.5"
    summary = "CLIP, an MLP, Llama"
    model_types = ("llava",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pixtral has the same model_type."""
        vision = config.get("vision_config")
        kind = vision.get("model_type") if isinstance(vision, dict) else None
        return super().recognises(config) and kind != "pixtral"

    def read_settings(self, folder: Path) -> Llava15Settings:
        config = read_part(Config, folder / "config.json")
        processor = read_processor(folder, config)
        preprocessor, where = read_images(CropPreprocessor, folder)
        return Llava15Settings(
            image_processor=images_of(Llava15ImageProcessor, config, preprocessor, where),
            stop_ids=stop_ids(folder, config),
            chat_template=read_chat_template(folder),
            name=config.name,
            tie_word_embeddings=config.ties(),
            config=config,
            text=config.text(),
            image_token=processor.image_token,
        )


FAMILY = Llava15()
