"""What a jina-vlm checkpoint's settings files say, validated: sizes are read, never assumed.

Only what the exported bundle reproduces is accepted. Every other value of a key that changes the
computation is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from edge_vlm.bundle.json_text import wrong
from edge_vlm.families.jina_vlm.tiling import JinaImageProcessor
from edge_vlm_export.checkpoint.config_file import (
    MAX_VOCABULARY,
    Epsilon,
    HubName,
    Layers,
    Off,
    On,
    Pair,
    Size,
    StopIds,
    agree,
    check_same,
    read_part,
)
from edge_vlm_export.checkpoint.known_keys import Keys, Known, check_known
from edge_vlm_export.families.base import Settings
from edge_vlm_export.families.llama_like import TextSettings
from edge_vlm_export.families.rope import RotaryText
from edge_vlm_export.families.settings_files import (
    IMAGE_KEYS,
    PROCESSOR_KEYS,
    read_chat_template,
    read_generation,
    read_images,
    read_stop_ids,
)
from edge_vlm_export.graph.architecture import AttentionSizes

IMAGE_PROMPT_TOKEN = "<|image|>"
_OF_OTHER_LAYERS = ("ratio", "lnorm_config")  # of layers without a size or with an inner norm


class VisionNorm(Known):
    """LayerNorm."""

    type: Literal["default"] = "default"
    with_affine: On = True
    bias: On = True
    eps: Epsilon


class TextNorm(Known):
    """RMSNorm."""

    type: Literal["rms"] = "rms"
    with_affine: On = True
    bias: Off = False
    eps: Epsilon


class InnerNorm(TextNorm):
    """Of queries and keys: all norms have the same eps."""

    eps: Epsilon | None = None  # type: ignore[assignment]  # may be absent


class Attention(Known):
    """Heads of one attention layer."""

    harmless: ClassVar[Keys] = ("fp32",)  # as exact as float32 in any case

    softmax_scale: None = None
    sliding_window: Literal[-1] | None = None
    clip_qkv: None = None
    inner_lnorm: Off = False
    o_lnorm: Off = False
    v_lnorm: Off = False
    n_heads: Size
    n_kv_heads: Size | None = None
    head_dim: Size | None = None

    def sizes(self, hidden: int, where: str) -> AttentionSizes:
        """Of a model with ``hidden`` values a position; ``where`` names this part in errors."""
        if self.head_dim is None and hidden % self.n_heads:
            problem = f"which does not divide hidden_size {hidden}"
            raise wrong(f"{where}.n_heads", self.n_heads, problem)
        return AttentionSizes(
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads or self.n_heads,
            head_dim=self.head_dim or hidden // self.n_heads,
        )


class VisionAttention(Attention):
    """Every query has a key of its own; all four products have biases."""

    harmless: ClassVar[Keys] = (*Attention.harmless, *("qkv_lnorm_on_heads", "lnorm_config"))

    q_bias: On = True
    k_bias: On = True
    v_bias: On = True
    o_bias: On = True
    q_lnorm: Off = False
    k_lnorm: Off = False

    @model_validator(mode="after")
    def _is_not_grouped(self) -> VisionAttention:
        agree(self, "n_kv_heads", self.n_heads, "n_heads, and grouped heads are not supported here")
        return self


class TextAttention(Attention):
    """Grouped heads with norms of queries and keys."""

    q_bias: Off = False
    k_bias: Off = False
    v_bias: Off = False
    o_bias: Off = False
    q_lnorm: On = True
    k_lnorm: On = True
    qkv_lnorm_on_heads: On = True
    lnorm_config: InnerNorm


class VisionFeedForward(Known):
    """down(gelu(up(x)))."""

    harmless: ClassVar[Keys] = _OF_OTHER_LAYERS
    activation_type: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    gated_activation: Off = False
    bias: On = True
    inner_lnorm: Off = False
    size: Size


class GatedFeedForward(Known):
    """down(silu(gate(x)) * up(x))."""

    harmless: ClassVar[Keys] = _OF_OTHER_LAYERS
    activation_type: Literal["silu"] = "silu"
    gated_activation: On = True
    bias: Off = False
    inner_lnorm: Off = False
    size: Size


class Block(Known):
    """What both kinds of blocks have in common."""

    attn_lscale_init: None = None
    ffn_lscale_init: None = None
    postnorm: Off = False


class VisionBlock(Block):
    """One layer of the vision tower."""

    attn_config: VisionAttention
    ffn_config: VisionFeedForward
    lnorm_config: VisionNorm


class TextBlock(Block):
    """One layer of the language model."""

    attn_config: TextAttention
    ffn_config: GatedFeedForward
    lnorm_config: TextNorm


class Connector(Known):
    """From patches to the decoder's vectors."""

    harmless: ClassVar[Keys] = ("spatial_merge_size",)  # a repetition of pooling_h

    padding_embed_type: Literal["pad_and_partial_pad"] = "pad_and_partial_pad"
    pooling_type: Literal["attention_meanq"] = "attention_meanq"
    projector_type: Literal["mlp"] = "mlp"
    mlp_projector_config: GatedFeedForward
    attn_pooling_config: VisionAttention
    pooling_h: int | None = None
    pooling_w: int | None = None


class VisionSettings(Known):
    """Vision tower and connector."""

    harmless: ClassVar[Keys] = ("positional_interpolation",)  # of other sizes than input_size

    linear_patch_embedding: On = True
    patch_embedding_bias: On = True
    use_absolute_positional_embeddings: On = True
    use_cls_token: Off = False
    pre_lnorm: Off = False
    post_lnorm: On = True
    n_channels: Literal[3] = 3
    input_size: Pair
    patch_size: int | None = None
    hidden_size: Size
    n_layers: Layers
    output_size: Size
    block_config: VisionBlock
    vl_connector_config: Connector
    vit_layers: list[int] = Field(min_length=1, max_length=64)

    @property
    def attention(self) -> AttentionSizes:
        """Of the blocks."""
        return self.block_config.attn_config.sizes(self.hidden_size, "block_config.attn_config")

    @property
    def pooling_attention(self) -> AttentionSizes:
        """Of the connector."""
        pooling = self.vl_connector_config.attn_pooling_config
        return pooling.sizes(self.hidden_size, "vl_connector_config.attn_pooling_config")

    @property
    def ffn_size(self) -> int:
        """Values between the two products of a block's feed-forward part."""
        return self.block_config.ffn_config.size

    @property
    def projector_size(self) -> int:
        """Values between the products of the connector's."""
        return self.vl_connector_config.mlp_projector_config.size

    @property
    def norm_eps(self) -> float:
        """Of every norm."""
        return self.block_config.lnorm_config.eps

    @property
    def used_states(self) -> tuple[int, ...]:
        """Indices into [output of every block..., final norm's output]."""
        return tuple(index % (self.n_layers + 1) for index in self.vit_layers)

    @property
    def n_used_layers(self) -> int:
        """Blocks that some used state depends on."""
        return min(max(self.used_states) + 1, self.n_layers)

    @property
    def uses_final_norm(self) -> bool:
        """Whether a used state is the final norm's output."""
        return self.n_layers in self.used_states

    @property
    def feature_size(self) -> int:
        """Values the connector sees for each patch."""
        return self.hidden_size * len(self.vit_layers)

    @model_validator(mode="after")
    def _sizes_agree(self) -> VisionSettings:
        n = self.n_layers + 1
        if any(not -n <= index < n for index in self.vit_layers):
            problem = f"expected indices from {-n} to {n - 1} of hidden states"
            raise wrong("vit_layers", self.vit_layers, problem)
        _ = self.attention, self.pooling_attention  # raise what is wrong
        return self


class TextConfig(RotaryText):
    """The language model."""

    rope: On = True
    normalize_input_embeds: Off = False
    hidden_size: Size
    n_layers: Layers
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY)]
    embedding_size: int | None = None
    additional_vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY)]
    max_sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    max_position_embeddings: int | None = None
    block_config: TextBlock
    tie_word_embeddings: bool | None = None
    eos_token_id: StopIds | None = None

    @property
    def attention(self) -> AttentionSizes:
        """Of the blocks."""
        return self.block_config.attn_config.sizes(self.hidden_size, "block_config.attn_config")

    @model_validator(mode="after")
    def _keys_agree(self) -> TextConfig:
        where, sizes, block = "block_config.attn_config", self.attention, self.block_config
        for key, used, because in (
            ("num_hidden_layers", self.n_layers, "n_layers"),
            ("embedding_size", self.vocab_size, "vocab_size"),
            ("max_position_embeddings", self.max_sequence_length, "max_sequence_length"),
            ("num_attention_heads", sizes.n_heads, f"{where}.n_heads"),
            ("num_key_value_heads", sizes.n_kv_heads, f"{where}.n_kv_heads"),
            ("head_dim", sizes.head_dim, f"{where}.head_dim"),
            ("intermediate_size", block.ffn_config.size, "block_config.ffn_config.size"),
            (f"{where}.lnorm_config.eps", block.lnorm_config.eps, "block_config.lnorm_config.eps"),
        ):
            agree(self, key, used, because)
        if sizes.n_heads % sizes.n_kv_heads:
            problem = f"which does not divide n_heads: {sizes.n_heads}"
            raise wrong(f"{where}.n_kv_heads", sizes.n_kv_heads, problem)
        if sizes.head_dim % 2:
            raise wrong(f"{where}.head_dim", sizes.head_dim, "rotary positions need an even number")
        return self


class Config(Known):
    """``config.json``."""

    vision_config: VisionSettings
    text_config: TextConfig
    hidden_size: int | None = None
    vocab_size: int | None = None
    tie_word_embeddings: bool | None = None
    eos_token_id: StopIds | None = None
    name: HubName = Field(default=None, validation_alias="_name_or_path")

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        text = self.text_config
        agree(self, "vision_config.output_size", text.hidden_size, "text_config.hidden_size")
        agree(self, "hidden_size", text.hidden_size, "text_config.hidden_size")
        agree(self, "vocab_size", text.vocab_size, "text_config.vocab_size")
        return self


class Preprocessor(JinaImageProcessor):
    """``preprocessor_config.json``: what changes pixels, and repetitions."""

    model_config = ConfigDict(extra="ignore")

    cropping_method: Literal["overlap-and-resize"] = "overlap-and-resize"
    normalization_method: Literal["minmax"] = "minmax"
    image_min: Annotated[float, Field(ge=-1, le=-1)] = -1.0
    image_max: Annotated[float, Field(ge=1, le=1)] = 1.0
    interpolation: Literal["bilinear"] = "bilinear"
    random_interpolation: Off = False
    antialias: Off = False
    resize_in_float32: Off = False
    preserve_aspect_ratio: Off = False
    do_resize: On = True
    do_convert_rgb: On = True
    padding_mask: Off = False
    padding_value: Annotated[float, Field(ge=0, le=0)] = 0.0
    crop_size: Any = None
    image_base_patch_h: Any = None
    image_base_patch_w: Any = None
    tokens_per_image: Any = None
    size: Any = None
    start_token_id: Any = None
    end_token_id: Any = None
    patch_token_id: Any = None
    column_token_id: Any = None

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, data: Any) -> Any:
        if isinstance(data, dict):  # mean and deviation are those of another normalization
            check_known(cls, data, (*IMAGE_KEYS, "image_mean", "image_std"))
            data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return data

    @model_validator(mode="after")
    def _repetitions_agree(self) -> Preprocessor:
        height, width = self.base_input_size
        if height == width:
            agree(self, "crop_size", height, "base_input_size")
        agree(self, "image_base_patch_h", self.patches_hw[0], "base_input_size")
        agree(self, "image_base_patch_w", self.patches_hw[1], "base_input_size")
        agree(self, "tokens_per_image", self.tokens_per_crop, "token_length_h and _w")
        if isinstance(self.size, dict):
            agree(self, "size.shortest_edge", self.min_pixels, "min_pixels")
            agree(self, "size.longest_edge", self.max_pixels, "max_pixels")
        return self

    def image_processor(self) -> JinaImageProcessor:
        """The runtime's part."""
        return JinaImageProcessor(**{k: getattr(self, k) for k in JinaImageProcessor.model_fields})


class Processor(Known):
    """``processor_config.json``."""

    harmless: ClassVar[Keys] = PROCESSOR_KEYS

    always_start_with_space: bool


@dataclass(frozen=True)
class JinaSettings(Settings):
    """Everything the settings files of a checkpoint say."""

    image_processor: JinaImageProcessor
    vision: VisionSettings
    text: TextSettings
    always_start_with_space: bool
    preprocessor: Preprocessor  # for checks that need the tokenizer
    preprocessor_path: Path
    first_special: int | None  # where a made-up tokenizer ends its vocabulary


def read_settings(folder: Path) -> JinaSettings:
    """See ``Family.read_settings``."""
    path = folder / "config.json"
    config = read_part(Config, path)
    preprocessor, where = read_images(Preprocessor, folder)
    images, vision = preprocessor.image_processor(), config.vision_config
    connector, pooling = vision.vl_connector_config, "vision_config.vl_connector_config.pooling_"
    for key, value, used in (
        ("vision_config.input_size", vision.input_size, images.base_input_size),
        ("vision_config.patch_size", vision.patch_size, images.patch_size),
        (f"{pooling}h", connector.pooling_h, images.pooling_h),
        (f"{pooling}w", connector.pooling_w, images.pooling_w),
    ):
        check_same(path, key, value, used, where.name)
    processor = read_part(Processor, folder / "processor_config.json")
    text = config.text_config
    n_ids = text.vocab_size + text.additional_vocab_size
    return JinaSettings(
        image_processor=images,
        stop_ids=read_stop_ids(folder, n_ids, config, text),
        chat_template=read_chat_template(folder),
        name=config.name,
        tie_word_embeddings=(config.tie_word_embeddings, text.tie_word_embeddings),
        vision=vision,
        text=TextSettings(
            n_layers=text.n_layers,
            hidden_size=text.hidden_size,
            attention=text.attention,
            ffn_size=text.block_config.ffn_config.size,
            norm_eps=text.block_config.lnorm_config.eps,
            rope_theta=text.theta,
            max_sequence_length=text.max_sequence_length,
            vocab_size=text.vocab_size,
            additional_vocab_size=text.additional_vocab_size,
        ),
        always_start_with_space=processor.always_start_with_space,
        preprocessor=preprocessor,
        preprocessor_path=where,
        first_special=read_generation(folder).bos_token_id,
    )
