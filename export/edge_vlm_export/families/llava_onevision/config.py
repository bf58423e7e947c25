"""What a LLaVA-OneVision checkpoint's settings files say, as its code reads them.

Source: configuration_llava_onevision.py, configuration_qwen2.py, configuration_siglip.py and the
image processor in transformers, for what absent keys mean.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field, Strict, ValidationError, model_validator

from edge_vlm.bundle.json_text import first_problem, wrong
from edge_vlm.errors import CheckpointError
from edge_vlm.families.llava_onevision.processor import OneVisionImageProcessor
from edge_vlm_export.checkpoint.config_file import (
    Epsilon,
    HubName,
    Layers,
    Off,
    On,
    Pair,
    Size,
    StopIds,
    TokenId,
    agree,
    check_same,
    read_part,
)
from edge_vlm_export.checkpoint.known_keys import Keys, Known
from edge_vlm_export.families.base import Settings
from edge_vlm_export.families.llama_like import DecoderText, TextSettings
from edge_vlm_export.families.settings_files import (
    IMAGE_KEYS,
    PROCESSOR_KEYS,
    read_chat_template,
    read_images,
    read_stop_ids,
)

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Three = Annotated[tuple[float, float, float], Strict(False)]  # an array is no tuple otherwise
Pinpoints = Annotated[list[Pair], Field(min_length=1, max_length=256)]  # height, width
AspectRatio = Annotated[str, Field(pattern=r"^anyres_max_[1-9][0-9]{0,2}$")]


class TextConfig(DecoderText):
    """Qwen2."""

    harmless: ClassVar[Keys] = (
        "sliding_window",
        "max_window_layers",
    )  # for use_sliding_window alone

    model_type: Literal["qwen2"]
    attention_bias: On = True  # of queries, keys and values


class VisionConfig(Known):
    """SigLIP without its pooling head."""

    harmless: ClassVar[Keys] = (
        "vision_use_head",
        "projection_dim",
    )  # behind what is used

    model_type: Literal["siglip_vision_model"]
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    image_size: Annotated[int, Field(ge=1, le=4096)]
    patch_size: Size
    num_channels: Literal[3] = 3
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    layer_norm_eps: Epsilon = 1e-6

    @model_validator(mode="after")
    def _agrees(self) -> VisionConfig:
        n_heads = self.num_attention_heads
        if self.hidden_size % n_heads:
            raise wrong("num_attention_heads", n_heads, "which does not divide hidden_size")
        return self


class Config(Known):
    """``config.json``."""

    harmless: ClassVar[Keys] = ("image_seq_length",)  # for sizes in advance

    model_type: Literal["llava_onevision"]
    text_config: TextConfig
    vision_config: VisionConfig
    hidden_size: int | None = None
    vocab_size: int | None = None
    image_token_id: TokenId = Field(
        validation_alias=AliasChoices("image_token_index", "image_token_id")
    )
    video_token_id: TokenId | None = Field(
        default=None, validation_alias=AliasChoices("video_token_index", "video_token_id")
    )
    image_grid_pinpoints: Pinpoints
    vision_aspect_ratio: AspectRatio = "anyres_max_9"
    vision_feature_layer: int = -1
    vision_feature_select_strategy: Literal["full"] = "full"
    projector_hidden_act: Literal["gelu"] = "gelu"
    multimodal_projector_bias: On = True
    use_image_newline_parameter: On = True
    tie_word_embeddings: bool | None = None
    eos_token_id: StopIds | None = None
    name: HubName = Field(default=None, validation_alias="_name_or_path")

    @property
    def used_layers(self) -> int:
        """Blocks up to the one whose output is used."""
        layer, n_layers = self.vision_feature_layer, self.vision_config.num_hidden_layers
        return layer if layer >= 0 else n_layers + 1 + layer

    @model_validator(mode="after")
    def _agrees(self) -> Config:
        n_layers, n_ids = self.vision_config.num_hidden_layers, self.text_config.vocab_size
        if not 1 <= self.used_layers <= n_layers:
            raise wrong(
                "vision_feature_layer", self.vision_feature_layer, f"the tower has {n_layers}"
            )
        for key in ("hidden_size", "vocab_size"):  # trainers repeat them
            agree(self, key, getattr(self.text_config, key), f"text_config.{key}")
        if self.image_token_id >= n_ids:
            raise wrong("image_token_index", self.image_token_id, f"there are {n_ids} ids")
        return self


class Square(Known):
    """Pixels of a crop."""

    height: Size
    width: Size


class Preprocessor(Known):
    """``preprocessor_config.json``; what is absent is the class's default."""

    harmless: ClassVar[Keys] = IMAGE_KEYS

    image_processor_type: Annotated[str, Field(pattern="^LlavaOnevisionImageProcessor")]
    image_grid_pinpoints: Pinpoints | None = None  # 384 * a x 384 * b up to 6 x 6
    size: Square = Square(height=384, width=384)
    image_mean: Three = _CLIP_MEAN
    image_std: Three = _CLIP_STD
    resample: Literal[3] = 3  # bicubic
    rescale_factor: Annotated[float, Field(ge=0.00392156, le=0.00392157)] = 1 / 255
    do_resize: On = True
    do_rescale: On = True
    do_normalize: On = True
    do_convert_rgb: On = True
    do_pad: On = True
    do_center_crop: Off = False

    @property
    def pinpoints(self) -> list[tuple[int, int]]:
        """(height, width) of the resolutions, in order."""
        return self.image_grid_pinpoints or [
            (384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)
        ]


class Processor(Known):
    """``processor_config.json``; newer checkpoints have the image processor in it."""

    harmless: ClassVar[Keys] = ("video_token", *PROCESSOR_KEYS)

    image_token: Annotated[str, Field(min_length=1, max_length=200)] = "<image>"
    num_image_tokens: Size | None = None
    vision_feature_select_strategy: Literal["full"] = "full"
    vision_aspect_ratio: AspectRatio | None = None


@dataclass(frozen=True)
class OneVisionSettings(Settings):
    """Everything the settings files of a checkpoint say."""

    image_processor: OneVisionImageProcessor
    config: Config
    text: TextSettings
    image_token: str


def read_settings(folder: Path) -> OneVisionSettings:
    """See ``Family.read_settings``."""
    path = folder / "config.json"
    config = read_part(Config, path)
    processor_path = folder / "processor_config.json"
    processor = read_part(Processor, processor_path) if processor_path.exists() else Processor()
    preprocessor, where = read_images(Preprocessor, folder)
    images = _image_processor(config, preprocessor, where)
    for key, used in (
        ("num_image_tokens", images.tokens_per_crop),
        ("vision_aspect_ratio", config.vision_aspect_ratio),
    ):
        check_same(processor_path, key, getattr(processor, key), used, path.name)
    text = _text(config)
    ties = [level.tie_word_embeddings for level in (config, config.text_config)]
    return OneVisionSettings(
        image_processor=images,
        stop_ids=read_stop_ids(folder, text.vocab_size, config, config.text_config),
        chat_template=read_chat_template(folder),
        name=config.name,
        # Published levels contradict each other; a head that is in the file is used.
        tie_word_embeddings=(True, False) if True in ties else tuple(ties),
        config=config,
        text=text,
        image_token=processor.image_token,
    )


def _image_processor(
    config: Config, preprocessor: Preprocessor, where: Path
) -> OneVisionImageProcessor:
    size, side = preprocessor.size, config.vision_config.image_size
    if (size.height, size.width) != (side, side):
        raise CheckpointError(
            f"{where}: size is {size.width}x{size.height}, which contradicts"
            f" vision_config.image_size in config.json: {side}"
        )
    if preprocessor.pinpoints != config.image_grid_pinpoints:
        raise CheckpointError(
            f"{where}: image_grid_pinpoints contradicts that in config.json: the resolution of a"
            " picture is chosen with both"
        )
    if any(pixels % side for pair in preprocessor.pinpoints for pixels in pair):
        raise CheckpointError(
            f"{where}: image_grid_pinpoints has sizes that are no tiles of {side}"
        )
    ratio = re.sub(r"\D", "", config.vision_aspect_ratio)
    try:
        return OneVisionImageProcessor(
            patch_size=config.vision_config.patch_size,
            tile_size=side,
            grids=tuple((h // side, w // side) for h, w in preprocessor.pinpoints),
            max_vectors=int(ratio),
            image_mean=preprocessor.image_mean,
            image_std=preprocessor.image_std,
        )
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_problem(error)}") from error


def _text(config: Config) -> TextSettings:
    """Ids from the image's on stand for parts of a prompt, or for nothing: they are only read."""
    text = config.text_config
    n_spoken = min(config.image_token_id, config.video_token_id or config.image_token_id)
    return text.settings(n_spoken)
