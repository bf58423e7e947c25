"""What an InternVL checkpoint's settings files say, in both layouts, as their code reads them.

The layout of transformers has model_type "internvl", the original one "internvl_chat"; the same
numbers go by other names in them.

Source: configuration_internvl.py and the image processor (models/got_ocr2) in transformers,
configuration_internvl_chat.py and conversation.py of the released repositories.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BeforeValidator, Field, Strict, model_validator

from edge_vlm.bundle.json_text import wrong
from edge_vlm_export.checkpoint.config_file import (
    Epsilon,
    HubName,
    Layers,
    Off,
    On,
    Size,
    StopIds,
    TokenId,
    agree,
)
from edge_vlm_export.checkpoint.known_keys import Keys, Known
from edge_vlm_export.families.llama_like import DecoderText
from edge_vlm_export.families.settings_files import IMAGE_KEYS, PROCESSOR_KEYS

CHAT = "internvl_chat"
SHUFFLE = 2  # patches along a side of the square that makes a vector
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Three = Annotated[tuple[float, float, float], Strict(False)]  # an array is no tuple otherwise
Half = Annotated[float, Field(ge=0.5, le=0.5)]
Zero = Annotated[int, Field(ge=0, le=0)]
Tiles = Annotated[int, Field(ge=1, le=256)]


def _side(value: Any) -> Any:
    """Of a square, which one layout gives as [height, width]."""
    is_square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return value[0] if is_square else value


def _not_dynamic(told: Any) -> Any:
    """Rotary positions without a scaling that is dynamic."""
    if not isinstance(told, dict):
        return told
    kinds = [told[key] for key in ("type", "rope_type") if key in told]
    if not kinds or any(kind != "dynamic" for kind in kinds):
        return told
    return {key: value for key, value in told.items() if key not in ("type", "rope_type", "factor")}


Side = Annotated[int, BeforeValidator(_side), Field(ge=1, le=4096)]


class TextConfig(DecoderText):
    """Qwen2, InternLM2, or the latter as Llama.

    "Dynamic" scaling of rotary positions changes nothing up to ``max_position_embeddings``, where a
    context ends here.
    """

    # For use_sliding_window alone.
    harmless: ClassVar[Keys] = ("sliding_window", "max_window_layers")

    model_type: Literal["qwen2", "internlm2", "llama"]
    bias: Off = False  # InternLM2's and Llama's
    attention_bias: bool | None = None
    mlp_bias: Off = False

    @classmethod
    def prepared(cls, data: dict[str, Any]) -> dict[str, Any]:
        without = {key: _not_dynamic(data.get(key)) for key in ("rope_scaling", "rope_parameters")}
        return super().prepared({**data, **without})

    @property
    def has_biases(self) -> bool:
        """Of queries, keys and values."""
        return self.model_type == "qwen2"

    @model_validator(mode="after")
    def _agrees(self) -> TextConfig:
        if self.attention_bias not in (None, self.has_biases):
            raise wrong("attention_bias", self.attention_bias, f"{self.model_type} has the other")
        return self


class VisionConfig(Known):
    """InternViT-300M. The one with 6 billion parameters has RMSNorm, qk-norm and no biases."""

    harmless: ClassVar[Keys] = (
        "layer_scale_init_value",
        # For use_moe alone.
        *("capacity_factor", "eval_capacity_factor", "laux_allreduce", "moe_coeff_ratio"),
        *("moe_intermediate_size", "moe_output_scale", "noisy_gate_policy", "num_experts"),
        *("num_routed_experts", "num_shared_experts", "shared_expert_intermediate_size"),
        *("use_residual", "use_rts", "use_weighted_residual"),
    )

    model_type: Literal["internvl_vision", "intern_vit_6b"]
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    image_size: Side
    patch_size: Side
    num_channels: Literal[3] = 3
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: Epsilon = 1e-6
    # The layouts have other defaults for these, so they have to be there.
    norm_type: Literal["layer_norm"]
    attention_bias: On | None = Field(
        default=None, validation_alias=AliasChoices("attention_bias", "qkv_bias")
    )
    use_qk_norm: Off | None = Field(
        default=None, validation_alias=AliasChoices("use_qk_norm", "qk_normalization")
    )
    use_absolute_position_embeddings: On = True
    use_mask_token: Off = False
    use_mean_pooling: On = True  # it leaves out the last norm
    use_moe: Off = False

    @model_validator(mode="after")
    def _agrees(self) -> VisionConfig:
        n_heads, patch = self.num_attention_heads, self.patch_size
        if self.hidden_size % n_heads:
            raise wrong("num_attention_heads", n_heads, "which does not divide hidden_size")
        if self.image_size % (SHUFFLE * patch):
            raise wrong("image_size", self.image_size, f"which is no multiple of {SHUFFLE * patch}")
        return self


class Config(Known):
    """``config.json`` of either layout."""

    harmless: ClassVar[Keys] = ("image_fold",)  # read by no code

    model_type: Literal["internvl", "internvl_chat"]
    text_config: TextConfig = Field(validation_alias=AliasChoices("text_config", "llm_config"))
    vision_config: VisionConfig
    hidden_size: int | None = None
    vocab_size: int | None = None
    downsample_ratio: Half = 0.5
    vision_feature_layer: int = Field(
        default=-1, validation_alias=AliasChoices("vision_feature_layer", "select_layer")
    )
    vision_feature_select_strategy: Literal["default"] = "default"
    projector_hidden_act: Literal["gelu"] = "gelu"
    image_token_id: TokenId | None = None
    image_seq_length: Size | None = None
    tie_word_embeddings: bool | None = None
    eos_token_id: StopIds | None = None
    name: HubName = Field(default=None, validation_alias="_name_or_path")
    # Of the original layout alone, with its defaults.
    ps_version: Literal["v1", "v2"] = "v1"
    template: str = Field(default="", max_length=200)
    force_image_size: Size | None = None
    dynamic_image_size: bool = False
    min_dynamic_patch: Tiles = 1
    max_dynamic_patch: Tiles = 6
    use_thumbnail: bool = False
    pad2square: Off = False
    use_backbone_lora: Zero = 0
    use_llm_lora: Zero = 0

    @property
    def is_chat(self) -> bool:
        """Whether this is the original layout."""
        return self.model_type == CHAT

    @property
    def used_layers(self) -> int:
        """Blocks up to the one whose output is used."""
        layer, n_layers = self.vision_feature_layer, self.vision_config.num_hidden_layers
        return layer if layer >= 0 else n_layers + 1 + layer

    @model_validator(mode="after")
    def _agrees(self) -> Config:
        layer = "select_layer" if self.is_chat else "vision_feature_layer"
        for name, original in (("attention_bias", "qkv_bias"), ("use_qk_norm", "qk_normalization")):
            if getattr(self.vision_config, name) is None:
                key = original if self.is_chat else name
                raise wrong(f"vision_config.{key}", None, "which has to be told")
        n_layers, text = self.vision_config.num_hidden_layers, self.text_config
        if not 1 <= self.used_layers <= n_layers:
            raise wrong(layer, self.vision_feature_layer, f"the tower has {n_layers}")
        for key in ("hidden_size", "vocab_size"):  # trainers repeat them
            agree(self, key, getattr(text, key), f"the language model's {key}")
        if not self.is_chat:
            if text.model_type == "internlm2":
                raise wrong("text_config.model_type", "internlm2", 'this layout calls it "llama"')
            if self.image_token_id is None:
                raise wrong("image_token_id", None, "which this layout has")
            return self
        side = self.vision_config.image_size
        if text.model_type == "llama":
            raise wrong("llm_config.model_type", "llama", 'expected "qwen2" or "internlm2"')
        if self.ps_version != "v2":
            raise wrong("ps_version", self.ps_version, 'must be "v2": another order of vectors')
        if not self.dynamic_image_size:
            raise wrong("dynamic_image_size", False, "must be true")
        if self.force_image_size not in (None, side):
            raise wrong(
                "force_image_size", self.force_image_size, f"vision_config.image_size is {side}"
            )
        return self


class Square(Known):
    """Pixels of a crop."""

    height: Size
    width: Size


class Preprocessor(Known):
    """``preprocessor_config.json`` of transformers; what is absent is the class's default."""

    # The processor around it always crops.
    harmless: ClassVar[Keys] = (*IMAGE_KEYS, "crop_to_patches")

    image_processor_type: Annotated[str, Field(pattern="^GotOcr2ImageProcessor")]
    size: Square = Square(height=384, width=384)
    min_patches: Tiles = 1
    max_patches: Tiles = 12
    image_mean: Three = _CLIP_MEAN
    image_std: Three = _CLIP_STD
    resample: Literal[3] = 3  # bicubic
    rescale_factor: Annotated[float, Field(ge=0.00392156, le=0.00392157)] = 1 / 255
    do_resize: On = True
    do_rescale: On = True
    do_normalize: On = True
    do_convert_rgb: On = True
    do_center_crop: Off = False
    do_pad: Off = False


class Processor(Known):
    """``processor_config.json``; newer checkpoints have the image processor in it."""

    harmless: ClassVar[Keys] = PROCESSOR_KEYS

    image_seq_length: Size | None = None
