"""What a Qwen2.5-VL checkpoint's settings files say, as its code reads them.

Source: configuration_qwen2_5_vl.py and the image processor in transformers, for what absent keys
mean. In released checkpoints the language model's keys stand at the top of config.json, in newer
ones in its ``text_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field, Strict, ValidationError, model_validator

from edge_vlm.bundle.json_text import first_problem, wrong
from edge_vlm.errors import CheckpointError
from edge_vlm.families.qwen2_5_vl.processor import QwenImageProcessor
from edge_vlm_export.checkpoint.config_file import (
    Epsilon,
    HubName,
    Layers,
    On,
    Size,
    TokenId,
    check_same,
    read_object,
    read_part,
)
from edge_vlm_export.checkpoint.known_keys import Keys, Known
from edge_vlm_export.checkpoint.tokenizer import MAX_TOKENIZER_BYTES, TOKENIZER_NAME
from edge_vlm_export.families.base import Settings
from edge_vlm_export.families.llama_like import DecoderText, TextSettings
from edge_vlm_export.families.settings_files import (
    IMAGE_KEYS,
    read_chat_template,
    read_images,
    read_stop_ids,
)

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Three = Annotated[tuple[float, float, float], Strict(False)]  # an array is no tuple otherwise
Sections = Annotated[tuple[Size, Size, Size], Strict(False)]
Pixels = Annotated[int, Field(ge=1, le=1 << 26)]

# Keys of the language model that a newer file may have twice.
_REPEATED = frozenset(
    (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "rope_theta"),
        *("hidden_act", "use_sliding_window"),
    )
)


class TextConfig(DecoderText):
    """Qwen2.5 with M-RoPE: how many of a head's frequencies turn by time, row and column."""

    harmless: ClassVar[Keys] = (
        "sliding_window",
        "max_window_layers",
    )  # for use_sliding_window alone

    model_type: Literal["qwen2_5_vl", "qwen2_5_vl_text"]
    rms_norm_eps: Epsilon = 1e-5
    mrope_section: Sections | None = None

    @classmethod
    def prepared(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Its rotary positions without what is M-RoPE's, which stands beside them."""
        data = dict(data)
        for key in ("rope_scaling", "rope_parameters"):
            if isinstance(told := data.get(key), dict):
                rest = {name: value for name, value in told.items() if name != "mrope_section"}
                kinds = [name for name in ("type", "rope_type") if rest.get(name) == "mrope"]
                data[key] = rest | dict.fromkeys(kinds, "default")
                if told.get("mrope_section") is not None:
                    data.setdefault("mrope_section", told["mrope_section"])
        return super().prepared(data)

    @property
    def sections(self) -> tuple[int, int, int]:
        """Frequencies of each kind."""
        return self.mrope_section or (0, 0, 0)

    @model_validator(mode="after")
    def _agrees(self) -> TextConfig:
        if 2 * sum(self.sections) != self.attention.head_dim:
            half = f"a head has {self.attention.head_dim / 2:g} frequencies"
            raise wrong("rope_scaling.mrope_section", self.mrope_section, half)
        return self


class VisionConfig(Known):
    """The tower and the merger."""

    harmless: ClassVar[Keys] = (
        "spatial_patch_size",
        "tokens_per_second",
    )  # read by nobody, and for films

    model_type: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    depth: Layers
    hidden_size: Size
    intermediate_size: Size
    num_heads: Size
    out_hidden_size: Size
    patch_size: Size = 14
    spatial_merge_size: Annotated[int, Field(ge=1, le=16)] = 2
    temporal_patch_size: Annotated[int, Field(ge=1, le=16)] = 2
    window_size: Size = 112
    fullatt_block_indexes: list[Annotated[int, Field(ge=0, le=1 << 10)]] = Field(
        default=[7, 15, 23, 31], max_length=1 << 10
    )
    in_channels: Literal[3] = Field(
        default=3, validation_alias=AliasChoices("in_channels", "in_chans")
    )
    hidden_act: Literal["silu"] = "silu"

    @model_validator(mode="after")
    def _agrees(self) -> VisionConfig:
        n_heads = self.num_heads
        if self.hidden_size % n_heads:
            raise wrong("num_heads", n_heads, "which does not divide hidden_size")
        if self.hidden_size // n_heads % 4:
            raise wrong("num_heads", n_heads, "rotary positions need heads of a multiple of four")
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise wrong("window_size", self.window_size, "which is not made of whole blocks")
        for index in self.fullatt_block_indexes:
            if index >= self.depth:
                raise wrong("fullatt_block_indexes", index, f"the tower has {self.depth} blocks")
        return self


class Config(Known):
    """``config.json`` without the language model."""

    model_type: Literal["qwen2_5_vl"]
    vision_config: VisionConfig
    image_token_id: TokenId
    tie_word_embeddings: bool | None = None
    name: HubName = Field(default=None, validation_alias="_name_or_path")


class Limits(Known):
    """``size``: numbers of pixels, whatever their names say."""

    shortest_edge: Pixels
    longest_edge: Pixels


class Preprocessor(Known):
    """``preprocessor_config.json``; what is absent is the class's default."""

    harmless: ClassVar[Keys] = IMAGE_KEYS

    image_processor_type: Annotated[str, Field(pattern=r"^Qwen2(_5_)?VLImageProcessor")]
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    size: Limits = Limits(shortest_edge=56 * 56, longest_edge=28 * 28 * 1280)
    patch_size: Size = 14
    temporal_patch_size: Size = 2
    merge_size: Size = 2
    image_mean: Three = _CLIP_MEAN
    image_std: Three = _CLIP_STD
    resample: Literal[3] = 3  # bicubic
    rescale_factor: Annotated[float, Field(ge=0.00392156, le=0.00392157)] = 1 / 255
    do_resize: On = True
    do_rescale: On = True
    do_normalize: On = True
    do_convert_rgb: On = True


@dataclass(frozen=True)
class QwenSettings(Settings):
    """What the settings files say; ``sections`` are M-RoPE's."""

    image_processor: QwenImageProcessor
    config: Config
    text: TextSettings
    sections: tuple[int, int, int]


class _WithText(Config):
    """With the language model's keys at the top."""

    harmless: ClassVar[Keys] = ("text_config", *TextConfig.model_fields, *TextConfig.harmless)


class _TextAtTheTop(TextConfig):
    harmless: ClassVar[Keys] = (*TextConfig.harmless, *Config.model_fields)


def read_settings(folder: Path) -> QwenSettings:
    """See ``Family.read_settings``."""
    path = folder / "config.json"
    written = read_object(path)
    config = read_part(_WithText, path)
    nested = written.get("text_config")
    if nested is None:
        text: TextConfig = read_part(_TextAtTheTop, path)
    else:
        text = read_part(TextConfig, path, inside="text_config")
        for key in _REPEATED & nested.keys():
            check_same(path, key, written.get(key), nested[key], f"text_config.{key}")
    vision = config.vision_config
    check_same(
        path,
        "vision_config.out_hidden_size",
        vision.out_hidden_size,
        text.hidden_size,
        "hidden_size",
    )
    if config.image_token_id >= text.vocab_size:
        raise CheckpointError(
            f"{path}: image_token_id is {config.image_token_id}, there are {text.vocab_size} ids"
        )
    sizes = text.settings(_known_ids(folder, text.vocab_size))
    return QwenSettings(
        image_processor=_image_processor(vision, *read_images(Preprocessor, folder)),
        stop_ids=read_stop_ids(folder, sizes.vocab_size, text),
        chat_template=read_chat_template(folder),
        name=config.name,
        tie_word_embeddings=tuple({config.tie_word_embeddings, text.tie_word_embeddings}),
        config=config,
        text=sizes,
        sections=text.sections,
    )


def _image_processor(
    vision: VisionConfig, preprocessor: Preprocessor, where: Path
) -> QwenImageProcessor:
    for key, used in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        check_same(where, key, getattr(preprocessor, key), used, "vision_config in config.json")
    try:
        return QwenImageProcessor(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            n_full_layers=len(set(vision.fullatt_block_indexes)),
            min_pixels=preprocessor.min_pixels or preprocessor.size.shortest_edge,
            max_pixels=preprocessor.max_pixels or preprocessor.size.longest_edge,
            image_mean=preprocessor.image_mean,
            image_std=preprocessor.image_std,
        )
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_problem(error)}") from error


def _known_ids(folder: Path, n_ids: int) -> int:
    """Ids up to the tokenizer's last one; rows of the token table behind it are no token's."""
    path = folder / TOKENIZER_NAME
    if not path.exists():
        return n_ids  # of a checkpoint that is only planned with
    written = read_object(path, MAX_TOKENIZER_BYTES)
    model, added = written.get("model"), written.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    ids: list[Any] = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else []
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, Mapping)]
    # What is malformed is told where the tokenizer is read.
    return min(n_ids, max((n for n in ids if type(n) is int), default=n_ids) + 1)
