"""What ``config.json`` and ``generation_config.json`` say of CLIP with Llama or Mistral.

Source: configuration_llava.py, configuration_llava_next.py, configuration_clip.py,
configuration_llama.py and configuration_mistral.py in transformers, for what absent keys mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field, model_validator

from edge_vlm.bundle.json_text import wrong
from edge_vlm_export.checkpoint.config_file import (
    Epsilon,
    HubName,
    Layers,
    Off,
    On,
    Part,
    Size,
    StopIds,
    TokenId,
    agree,
)
from edge_vlm_export.checkpoint.known_keys import Keys, Known
from edge_vlm_export.families.llama_like import DecoderText, TextSettings
from edge_vlm_export.families.settings_files import read_stop_ids

_SHARED = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
# What keys mean that are absent altogether; null is another thing.
_DEFAULTS: dict[Any, dict[str, int]] = {
    "llama": {**_SHARED, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_SHARED,
        "intermediate_size": 14336,
        "max_position_embeddings": 1 << 17,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}


class LlamaConfig(DecoderText):
    """Llama, or Mistral."""

    model_type: Literal["llama", "mistral"]
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 24)]
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    attention_bias: Off = False
    mlp_bias: Off = False

    @classmethod
    def prepared(cls, data: dict[str, Any]) -> dict[str, Any]:
        """With what keys mean that are absent: null is another thing, above all of a window."""
        kind = data.get("model_type")
        told = {**_DEFAULTS.get(kind, {}), **data} if isinstance(kind, str) else data
        if told.get("rope_theta") is None and not told.get("rope_parameters"):
            told = {**told, "rope_theta": 10000.0}
        return super().prepared(told)

    @property
    def context_length(self) -> int:
        """As long as a prompt fits the window, the window changes nothing."""
        longest = self.max_position_embeddings
        return min(longest, self.sliding_window or longest)


class Unsaid(Part):
    """What Llama's class says where a file says nothing."""

    eos_token_id: StopIds = [2]  # noqa: RUF012 - a field


class ClipConfig(Known):
    """CLIP's tower; absent sizes are those of ViT-B/32."""

    harmless: ClassVar[Keys] = ("projection_dim", "vocab_size")  # of CLIP's other half

    model_type: Literal["clip_vision_model"]
    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    image_size: Annotated[int, Field(ge=1, le=4096)] = 224
    patch_size: Size = 32
    num_channels: Literal[3] = 3
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    @model_validator(mode="after")
    def _agrees(self) -> ClipConfig:
        n_heads = self.num_attention_heads
        if self.hidden_size % n_heads:
            raise wrong("num_attention_heads", n_heads, "which does not divide hidden_size")
        return self


class ClipLlamaConfig(Known):
    """``config.json`` of CLIP, two products and Llama."""

    harmless: ClassVar[Keys] = ("image_seq_length",)  # for sizes in advance

    text_config: LlamaConfig
    vision_config: ClipConfig
    image_token_id: TokenId = Field(
        validation_alias=AliasChoices("image_token_index", "image_token_id")
    )
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default"] = "default"
    projector_hidden_act: Literal["gelu"] = "gelu"
    multimodal_projector_bias: On = True
    tie_word_embeddings: bool | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    eos_token_id: StopIds | None = None
    name: HubName = Field(default=None, validation_alias="_name_or_path")

    @property
    def used_layers(self) -> int:
        """Blocks up to the one whose output is used."""
        layer, n_layers = self.vision_feature_layer, self.vision_config.num_hidden_layers
        return layer if layer >= 0 else n_layers + 1 + layer

    @model_validator(mode="after")
    def _agrees(self) -> ClipLlamaConfig:
        n_layers, n_ids = self.vision_config.num_hidden_layers, self.text_config.vocab_size
        if not 1 <= self.used_layers <= n_layers:
            raise wrong(
                "vision_feature_layer", self.vision_feature_layer, f"the tower has {n_layers}"
            )
        if not 0 < self.image_token_id < n_ids:
            raise wrong("image_token_index", self.image_token_id, f"there are {n_ids} ids")
        for key in ("hidden_size", "vocab_size"):  # trainers repeat them
            agree(self, key, getattr(self.text_config, key), f"text_config.{key}")
        return self

    def text(self) -> TextSettings:
        """Ids from the image's on stand for parts of a prompt, or for nothing: only read."""
        return self.text_config.settings(self.image_token_id)

    def ties(self) -> tuple[bool | None, ...]:
        """See ``Settings``; where levels contradict each other, a head in the file is used."""
        ties = self.tie_word_embeddings, self.text_config.tie_word_embeddings
        return (True, False) if True in ties else ties


def stop_ids(folder: Path, config: ClipLlamaConfig) -> tuple[int, ...]:
    """What ends an answer; 2 where nothing is said, the default of Llama and Mistral.

    Raises:
        CheckpointError: an answer cannot have that id.
    """
    return read_stop_ids(folder, config.image_token_id, config, config.text_config, Unsaid())
