"""What a Pixtral checkpoint's settings files say, as its code reads them.

Source: configuration_llava.py, configuration_pixtral.py, configuration_mistral.py, the image
processor and the processor in transformers, for what absent keys mean. Mistral's own layout
(params.json, consolidated.safetensors) is another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BeforeValidator, Field, Strict, ValidationError, model_validator

from edge_vlm.bundle.json_text import first_problem, wrong
from edge_vlm.errors import CheckpointError
from edge_vlm.families.pixtral.processor import PixtralImageProcessor
from edge_vlm_export.checkpoint.config_file import (
    HubName,
    Layers,
    Off,
    On,
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
from edge_vlm_export.families.rope import Rope, Theta
from edge_vlm_export.families.settings_files import (
    IMAGE_KEYS,
    PROCESSOR,
    PROCESSOR_KEYS,
    read_chat_template,
    read_images,
    read_stop_ids,
)

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_WINDOW = 4096  # Mistral's where nothing is said; null is none

Three = Annotated[tuple[float, float, float], Strict(False)]  # an array is no tuple otherwise
Special = Annotated[str, Field(min_length=1, max_length=200)]


class TextConfig(DecoderText):
    """Mistral; what is absent is the class's default."""

    model_type: Literal["mistral"]
    hidden_size: Size = 4096
    intermediate_size: Size = 14336
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size = 8
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)] = 32000
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 24)] = 1 << 17
    sliding_window: Size | None = None
    eos_token_id: StopIds = Field(default=[2])

    @classmethod
    def prepared(cls, data: dict[str, Any]) -> dict[str, Any]:
        """With the window that is meant where none is told, which ``null`` is not."""
        return super().prepared({"sliding_window": _WINDOW, **data})

    @property
    def context_length(self) -> int:
        """As long as a prompt fits the window, the window changes nothing."""
        longest = self.max_position_embeddings
        return min(longest, self.sliding_window or longest)


class VisionConfig(Known):
    """The tower; what is absent is the class's default."""

    model_type: Literal["pixtral"]
    hidden_size: Size = 1024
    intermediate_size: Size = 4096
    num_hidden_layers: Layers = 24
    num_attention_heads: Size = 16
    head_dim: Size | None = None
    num_channels: Literal[3] = 3
    image_size: Annotated[int, Field(ge=1, le=1 << 14)] = 1024
    patch_size: Size = 16
    hidden_act: Literal["silu", "gelu"] = "gelu"
    rope_theta: Theta | None = None
    rope_parameters: Rope = Rope()

    @property
    def theta(self) -> float:
        """The base of the rotary positions' frequencies."""
        return self.rope_theta or self.rope_parameters.rope_theta or 10000.0

    @model_validator(mode="after")
    def _agrees(self) -> VisionConfig:
        n_heads = self.num_attention_heads
        if self.hidden_size % n_heads:
            raise wrong("num_attention_heads", n_heads, "which does not divide hidden_size")
        if self.hidden_size // n_heads % 4:
            raise wrong(
                "num_attention_heads", n_heads, "rotary positions need heads of a multiple of four"
            )
        agree(self, "head_dim", self.hidden_size // n_heads, "hidden_size / num_attention_heads")
        return self


class Config(Known):
    """``config.json``."""

    harmless: ClassVar[Keys] = ("image_seq_length",)  # for sizes in advance

    model_type: Literal["llava"]
    text_config: TextConfig
    vision_config: VisionConfig
    image_token_id: TokenId = Field(
        validation_alias=AliasChoices("image_token_index", "image_token_id")
    )
    vision_feature_layer: Literal[-1]
    vision_feature_select_strategy: Literal["full"]
    projector_hidden_act: Literal["gelu"] = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool | None = None
    eos_token_id: StopIds | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    name: HubName = Field(default=None, validation_alias="_name_or_path")

    @model_validator(mode="after")
    def _agrees(self) -> Config:
        n_ids = self.text_config.vocab_size
        for key in ("hidden_size", "vocab_size"):  # trainers repeat them
            agree(self, key, getattr(self.text_config, key), f"text_config.{key}")
        if self.image_token_id >= n_ids:
            raise wrong("image_token_index", self.image_token_id, f"there are {n_ids} ids")
        return self


def _side(value: Any) -> Any:
    """Of a square of patches, given as a number or as its two sides."""
    if isinstance(value, dict) and value.keys() == {"height", "width"}:
        height, width = value["height"], value["width"]
        return height if height == width else value
    return value


Side = Annotated[Size, BeforeValidator(_side)]


class Edge(Known):
    """``size``: of the longer side, at most."""

    longest_edge: Annotated[int, Field(ge=1, le=1 << 14)]


class Preprocessor(Known):
    """``preprocessor_config.json``; what is absent is the class's default.

    Its ``patch_size`` counts for nothing beside the processor's.
    """

    harmless: ClassVar[Keys] = ("patch_size", *IMAGE_KEYS)

    image_processor_type: Annotated[str, Field(pattern="^PixtralImageProcessor(Fast|Pil)?$")]
    size: Edge = Edge(longest_edge=1024)
    image_mean: Three = _CLIP_MEAN
    image_std: Three = _CLIP_STD
    resample: Literal[3] = 3  # bicubic
    rescale_factor: Annotated[float, Field(ge=0.00392156, le=0.00392157)] = 1 / 255
    do_resize: On = True
    do_rescale: On = True
    do_normalize: On = True
    do_convert_rgb: On = True
    do_center_crop: Off = False


class Processor(Known):
    """``processor_config.json``. Its ``patch_size`` is the one that counts."""

    harmless: ClassVar[Keys] = PROCESSOR_KEYS

    patch_size: Side = 16
    spatial_merge_size: Literal[1] = 1
    image_token: Special = "[IMG]"
    image_break_token: Special = "[IMG_BREAK]"
    image_end_token: Special = "[IMG_END]"


@dataclass(frozen=True)
class PixtralSettings(Settings):
    """Everything the settings files of a checkpoint say."""

    image_processor: PixtralImageProcessor
    config: Config
    text: TextSettings
    processor: Processor


def read_settings(folder: Path) -> PixtralSettings:
    """See ``Family.read_settings``."""
    path = folder / "config.json"
    config = read_part(Config, path)
    processor_path = folder / PROCESSOR
    processor = read_part(Processor, processor_path) if processor_path.exists() else Processor()
    check_same(
        processor_path,
        "patch_size",
        processor.patch_size,
        config.vision_config.patch_size,
        "vision_config in config.json",
    )
    text = config.text_config.settings()
    ties = config.tie_word_embeddings, config.text_config.tie_word_embeddings
    return PixtralSettings(
        image_processor=_image_processor(config.vision_config, *read_images(Preprocessor, folder)),
        stop_ids=read_stop_ids(folder, text.vocab_size, config, config.text_config),
        chat_template=read_chat_template(folder),
        name=config.name,
        # Levels may contradict each other; a head that is in the file is used.
        tie_word_embeddings=(True, False) if True in ties else ties,
        config=config,
        text=text,
        processor=processor,
    )


def _image_processor(
    vision: VisionConfig, preprocessor: Preprocessor, where: Path
) -> PixtralImageProcessor:
    edge, patch = preprocessor.size.longest_edge, vision.patch_size
    side = -(-edge // patch)
    if side > vision.image_size // patch:
        raise CheckpointError(
            f"{where}: size.longest_edge is {edge}, which is {side} patches; vision_config in"
            f" config.json has positions for {vision.image_size // patch} (image_size)"
        )
    try:
        return PixtralImageProcessor(
            patch_size=patch,
            longest_edge=edge,
            max_patches=side**2,
            image_mean=preprocessor.image_mean,
            image_std=preprocessor.image_std,
        )
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_problem(error)}") from error
