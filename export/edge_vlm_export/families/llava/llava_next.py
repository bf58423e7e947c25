"""LLaVA-NeXT for the exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from edge_vlm.errors import CheckpointError
from edge_vlm.families.llava.tiles import LlavaNextImageProcessor
from edge_vlm_export.checkpoint.config_file import On, Pair, read_part
from edge_vlm_export.families.base import Settings
from edge_vlm_export.families.llava.family import ClipLlama
from edge_vlm_export.families.llava.pictures import (
    Preprocessor,
    images_of,
    read_processor,
)
from edge_vlm_export.families.llava.settings import ClipLlamaConfig, stop_ids
from edge_vlm_export.families.llava_like import NEWLINE, newline_marker
from edge_vlm_export.families.settings_files import read_chat_template, read_images

if TYPE_CHECKING:
    from pathlib import Path

    from edge_vlm_export.checkpoint.tensors import Checkpoint, Values
    from edge_vlm_export.checkpoint.tokenizer import Tokenizer
    from edge_vlm_export.families.llama_like import TextSettings

_PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]

Pinpoints = Annotated[list[Pair], Field(min_length=1, max_length=256)]  # height, width


class Config(ClipLlamaConfig):
    """``config.json``."""

    model_type: Literal["llava_next"]
    image_grid_pinpoints: Pinpoints = _PINPOINTS
    use_image_newline_parameter: On = True


class AnyresPreprocessor(Preprocessor):
    """``preprocessor_config.json``."""

    image_processor_type: Annotated[str, Field(pattern="^LlavaNextImageProcessor(Fast|Pil)?$")] = (
        "LlavaNextImageProcessor"
    )
    image_grid_pinpoints: Pinpoints = _PINPOINTS
    aspect_ratio_setting: Literal["anyres"] = "anyres"
    do_pad: On = True


@dataclass(frozen=True)
class LlavaNextSettings(Settings):
    """Everything the settings files of a checkpoint say."""

    image_processor: LlavaNextImageProcessor
    config: Config
    text: TextSettings
    image_token: str


class LlavaNext(ClipLlama):
    """An overview and the tiles of one of some resolutions; Mistral or Llama."""

    name = "llava-next"
    summary = "CLIP, an MLP, Mistral or Llama"
    model_types = ("llava_next",)
    newline = NEWLINE

    def read_settings(self, folder: Path) -> LlavaNextSettings:
        config = read_part(Config, folder / "config.json")
        processor = read_processor(folder, config)
        preprocessor, where = read_images(AnyresPreprocessor, folder)
        grids = _grids(config, preprocessor, where)
        return LlavaNextSettings(
            image_processor=images_of(
                LlavaNextImageProcessor, config, preprocessor, where, grids=grids
            ),
            stop_ids=stop_ids(folder, config),
            chat_template=read_chat_template(folder),
            name=config.name,
            tie_word_embeddings=config.ties(),
            config=config,
            text=config.text(),
            image_token=processor.image_token,
        )

    def markers(
        self, settings: LlavaNextSettings, tokenizer: Tokenizer, tensors: Checkpoint
    ) -> Values:
        """The vector behind each row, which is no token's."""
        return newline_marker(tensors)


def _grids(
    config: Config, preprocessor: AnyresPreprocessor, where: Path
) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of tiles: the resolution is chosen by both, who have to agree."""
    side, pinpoints = config.vision_config.image_size, preprocessor.image_grid_pinpoints
    if pinpoints != config.image_grid_pinpoints:
        raise CheckpointError(
            f"{where}: image_grid_pinpoints contradicts that in config.json: the resolution of a"
            " picture is chosen with both"
        )
    if any(pixels % side for pair in pinpoints for pixels in pair):
        raise CheckpointError(
            f"{where}: image_grid_pinpoints has sizes that are no tiles of {side}"
        )
    return tuple((height // side, width // side) for height, width in pinpoints)


FAMILY = LlavaNext()
