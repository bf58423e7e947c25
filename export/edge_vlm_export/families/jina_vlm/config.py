"""What the checkpoint's settings files say, validated: sizes are read, never assumed.

Only what the exported bundle reproduces is accepted. Every other value of a key that changes the
computation is refused by name. Keys that only matter for training (dropout, initialization) and
keys whose effect is fixed by another one are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from edge_vlm.errors import CheckpointError
from edge_vlm.families.jina_vlm.processor import JinaImageProcessor
from edge_vlm_export.checkpoint.json_file import Section, is_text, read_json, read_text
from edge_vlm_export.checkpoint.tokenizer import MAX_VOCABULARY
from edge_vlm_export.families.base import Settings
from edge_vlm_export.families.llama_like import TextSettings
from edge_vlm_export.graph.tower import AttentionSizes

MAX_TEMPLATE_BYTES = 1 << 20
MAX_SIZE = 1 << 20
MAX_LAYERS = 1 << 10
IMAGE_PROMPT_TOKEN = "<|image|>"  # noqa: S105 - a token of the vocabulary, no password


@dataclass(frozen=True)
class VisionSettings:
    """Vision tower and connector."""

    n_layers: int
    hidden_size: int
    attention: AttentionSizes
    ffn_size: int
    norm_eps: float
    used_states: tuple[int, ...]  # indices into [output of every block..., final norm's output]
    pooling_attention: AttentionSizes
    projector_size: int
    output_size: int

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
        return self.hidden_size * len(self.used_states)


@dataclass(frozen=True)
class JinaSettings(Settings):
    """Everything the settings files of a checkpoint say."""

    image_processor: JinaImageProcessor
    vision: VisionSettings
    text: TextSettings
    always_start_with_space: bool
    preprocessor: Section  # for checks that need the tokenizer


def read_settings(folder: Path) -> JinaSettings:
    """Read and validate the settings files in ``folder``.

    Raises:
        CheckpointError: a file is missing or malformed, files contradict each other, or a value is
            not supported; the message names file, key and value.
    """
    config = read_json(folder / "config.json")
    config.only("model_type", "jvlm")
    vision = _vision(config.section("vision_config"))
    text = _text(config.section("text_config"))
    if vision.output_size != text.hidden_size:
        raise config.section("vision_config").error(
            "output_size", f"which contradicts text_config.hidden_size: {text.hidden_size}"
        )
    preprocessor = read_json(folder / "preprocessor_config.json")
    image_processor = _image_processor(preprocessor, config.section("vision_config"))
    processor = read_json(folder / "processor_config.json")
    levels = (config, config.section("text_config"))
    ties = tuple(
        level.boolean("tie_word_embeddings") if "tie_word_embeddings" in level else None
        for level in levels
    )
    return JinaSettings(
        vision=vision,
        text=text,
        image_processor=image_processor,
        tie_word_embeddings=(ties[0], ties[1]),
        stop_ids=_stop_ids(read_json(folder / "generation_config.json"), text.n_ids),
        always_start_with_space=processor.boolean("always_start_with_space"),
        chat_template=_chat_template(folder),
        name=_hub_name(config),
        preprocessor=preprocessor,
    )


def _vision(config: Section) -> VisionSettings:
    config.only("linear_patch_embedding", True)
    config.only("patch_embedding_bias", True)
    config.only("use_absolute_positional_embeddings", True)
    config.only("use_cls_token", False)
    config.only("pre_lnorm", False)
    config.only("post_lnorm", True)
    config.only("n_channels", 3)
    hidden = config.integer("hidden_size", 1, MAX_SIZE)
    n_layers = config.integer("n_layers", 1, MAX_LAYERS)
    block = _block(config)
    _vision_norm(block.section("lnorm_config"))
    feed_forward = block.section("ffn_config")
    feed_forward.only("activation_type", "gelu_pytorch_tanh")
    feed_forward.only("gated_activation", False)
    feed_forward.only("bias", True)
    feed_forward.only("inner_lnorm", False)

    connector = config.section("vl_connector_config")
    connector.only("padding_embed_type", "pad_and_partial_pad")
    connector.only("pooling_type", "attention_meanq")
    connector.only("projector_type", "mlp")
    projector = connector.section("mlp_projector_config")
    _gated_silu(projector)
    return VisionSettings(
        n_layers=n_layers,
        hidden_size=hidden,
        attention=_vision_attention(block.section("attn_config"), hidden),
        ffn_size=feed_forward.integer("size", 1, MAX_SIZE),
        norm_eps=_eps(block.section("lnorm_config")),
        used_states=_used_states(config, n_layers),
        pooling_attention=_vision_attention(connector.section("attn_pooling_config"), hidden),
        projector_size=projector.integer("size", 1, MAX_SIZE),
        output_size=config.integer("output_size", 1, MAX_SIZE),
    )


def _text(config: Section) -> TextSettings:
    config.only("rope", True)
    config.only("rope_scaling", None)
    config.only("partial_rotary_factor", 1.0)
    config.only("normalize_input_embeds", False)
    hidden = config.integer("hidden_size", 1, MAX_SIZE)
    n_layers = config.integer("n_layers", 1, MAX_LAYERS)
    config.agrees("num_hidden_layers", n_layers, "n_layers")
    vocab_size = config.integer("vocab_size", 1, MAX_VOCABULARY)
    config.agrees("embedding_size", vocab_size, "vocab_size")
    length = config.integer("max_sequence_length", 1, 1 << 24)
    config.agrees("max_position_embeddings", length, "max_sequence_length")

    block = _block(config)
    attention = block.section("attn_config")
    sizes = _attention(attention, hidden)
    for key in ("q_bias", "k_bias", "v_bias", "o_bias", "v_lnorm"):
        attention.only(key, False)
    for key in ("q_lnorm", "k_lnorm", "qkv_lnorm_on_heads"):
        attention.only(key, True)
    if sizes.n_heads % sizes.n_kv_heads:
        raise attention.error("n_kv_heads", f"which does not divide n_heads: {sizes.n_heads}")
    if sizes.head_dim % 2:
        raise attention.error("head_dim", "rotary positions need an even number")
    norm = block.section("lnorm_config")
    for section in (norm, attention.section("lnorm_config")):
        section.only("type", "rms")
        section.only("with_affine", True)
        section.only("bias", False)
    eps = _eps(norm)
    attention.section("lnorm_config").agrees("eps", eps, "block_config.lnorm_config.eps")
    feed_forward = block.section("ffn_config")
    _gated_silu(feed_forward)
    return TextSettings(
        n_layers=n_layers,
        hidden_size=hidden,
        attention=sizes,
        ffn_size=feed_forward.integer("size", 1, MAX_SIZE),
        norm_eps=eps,
        rope_theta=config.number("rope_theta", 0, 1e12),
        max_sequence_length=length,
        vocab_size=vocab_size,
        additional_vocab_size=config.integer("additional_vocab_size", 1, MAX_VOCABULARY),
    )


def _block(config: Section) -> Section:
    block = config.section("block_config")
    block.only("attn_lscale_init", None)
    block.only("ffn_lscale_init", None)
    block.only("postnorm", False)
    return block


def _attention(config: Section, hidden: int) -> AttentionSizes:
    config.only("softmax_scale", None)
    config.only("sliding_window", -1, None)
    config.only("clip_qkv", None)
    config.only("inner_lnorm", False)
    config.only("o_lnorm", False)
    n_heads = config.integer("n_heads", 1, MAX_SIZE)
    if "head_dim" not in config and hidden % n_heads:
        raise config.error("n_heads", f"which does not divide hidden_size {hidden}")
    return AttentionSizes(
        n_heads=n_heads,
        n_kv_heads=config.integer("n_kv_heads", 1, MAX_SIZE, default=n_heads),
        head_dim=config.integer("head_dim", 1, MAX_SIZE, default=hidden // n_heads),
    )


def _vision_attention(config: Section, hidden: int) -> AttentionSizes:
    sizes = _attention(config, hidden)
    config.agrees("n_kv_heads", sizes.n_heads, "n_heads, and grouped heads are not supported here")
    for key in ("q_bias", "k_bias", "v_bias", "o_bias"):
        config.only(key, True)
    for key in ("q_lnorm", "k_lnorm", "v_lnorm"):
        config.only(key, False)
    return sizes


def _vision_norm(config: Section) -> None:
    config.only("type", "default")
    config.only("with_affine", True)
    config.only("bias", True)


def _gated_silu(config: Section) -> None:
    config.only("activation_type", "silu")
    config.only("gated_activation", True)
    config.only("bias", False)
    config.only("inner_lnorm", False)


def _eps(norm: Section) -> float:
    return norm.number("eps", 0, 1)


def _used_states(config: Section, n_layers: int) -> tuple[int, ...]:
    n_states = n_layers + 1
    entries = config.array("vit_layers", 64)
    if not entries or any(
        type(entry) is not int or not -n_states <= entry < n_states for entry in entries
    ):
        raise config.error(
            "vit_layers", f"expected indices from {-n_states} to {n_states - 1} of hidden states"
        )
    return tuple(entry % n_states for entry in entries)


def _image_processor(config: Section, vision: Section) -> JinaImageProcessor:
    config.only("cropping_method", "overlap-and-resize")
    config.only("normalization_method", "minmax")
    config.only("image_min", -1.0)
    config.only("image_max", 1.0)
    config.only("interpolation", "bilinear")
    config.only("random_interpolation", False)
    config.only("antialias", False)
    config.only("resize_in_float32", False)
    config.only("preserve_aspect_ratio", False)
    config.only("do_resize", True)
    config.only("do_convert_rgb", True)
    config.only("padding_mask", False)
    values = {
        "patch_size": config.integer("patch_size", 1, MAX_SIZE),
        "base_input_size": config.pair("base_input_size", 1, MAX_SIZE),
        "overlap_margins": config.pair("overlap_margins", 0, 1 << 10),
        "max_crops": config.integer("max_crops", 1, 1024),
        "min_pixels": config.integer("min_pixels", 1, 1 << 28),
        "max_pixels": config.integer("max_pixels", 1, 1 << 28),
        "pooling_h": config.integer("pooling_h", 1, 64),
        "pooling_w": config.integer("pooling_w", 1, 64),
        "token_length_h": config.integer("token_length_h", 1, MAX_SIZE),
        "token_length_w": config.integer("token_length_w", 1, MAX_SIZE),
        "use_column_tokens": config.boolean("use_column_tokens"),
    }
    try:
        settings = JinaImageProcessor.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = "".join(f"{part}: " for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{config.path}: {field}{message}") from error
    _check_redundant(config, vision, settings)
    return settings


def _check_redundant(config: Section, vision: Section, settings: JinaImageProcessor) -> None:
    """The same geometry is told in several places; they have to agree."""
    size = settings.base_input_size
    rows, columns = settings.patches_hw
    because = "preprocessor_config.json"
    if vision.pair("input_size", 1, MAX_SIZE) != size:
        raise vision.error("input_size", f"which contradicts {because}: {list(size)}")
    vision.agrees("patch_size", settings.patch_size, because)
    connector = vision.section("vl_connector_config")
    connector.agrees("pooling_h", settings.pooling_h, because)
    connector.agrees("pooling_w", settings.pooling_w, because)
    if size[0] == size[1]:
        config.agrees("crop_size", size[0], "base_input_size")
    config.agrees("image_base_patch_h", rows, "base_input_size")
    config.agrees("image_base_patch_w", columns, "base_input_size")
    config.agrees("tokens_per_image", settings.tokens_per_crop, "token_length_h and _w")
    if isinstance(config.data.get("size"), dict):
        limits = config.section("size")
        limits.agrees("shortest_edge", settings.min_pixels, "min_pixels")
        limits.agrees("longest_edge", settings.max_pixels, "max_pixels")


def _stop_ids(config: Section, n_ids: int) -> tuple[int, ...]:
    value = config.data.get("eos_token_id")
    entries = value if isinstance(value, list) else [value]
    if (
        not entries
        or len(entries) > 64
        or any(type(entry) is not int or not 0 <= entry < n_ids for entry in entries)
    ):
        raise config.error("eos_token_id", f"expected one or more token ids below {n_ids}")
    return tuple(dict.fromkeys(entries))


def _chat_template(folder: Path) -> str:
    """``chat_template.jinja``, or the template in ``tokenizer_config.json``."""
    path = folder / "chat_template.jinja"
    if path.exists():
        template = read_text(path, MAX_TEMPLATE_BYTES)
    else:
        if not (folder / "tokenizer_config.json").exists():
            raise CheckpointError(f"{path}: is missing from the checkpoint")
        config = read_json(folder / "tokenizer_config.json")
        value = config.data.get("chat_template")
        if isinstance(value, list):
            named = [item for item in value if isinstance(item, dict)]
            value = next((i.get("template") for i in named if i.get("name") == "default"), None)
        if not isinstance(value, str):
            raise CheckpointError(
                f"{folder}: has no chat template, neither chat_template.jinja nor a"
                " chat_template in tokenizer_config.json"
            )
        template = value
    if not template.strip() or len(template) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{folder}: the chat template is empty or larger than 1 MiB")
    if not is_text(template) or "\0" in template:
        raise CheckpointError(f"{folder}: the chat template is not valid Unicode text")
    return template


def _hub_name(config: Section) -> str | None:
    """``_name_or_path`` when it is a hub name; a path of the author's machine is no name."""
    value = config.data.get("_name_or_path")
    if not isinstance(value, str) or len(value) > 200:
        return None
    parts = value.split("/")
    plain = all(
        part and part[0].isalnum() and all(c.isalnum() or c in "._-" for c in part)
        for part in parts
    )
    return value if plain and len(parts) == 2 else None
