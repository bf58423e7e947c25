"""Settings files: what is read, and every value that is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from edge_vlm_export.checkpoint import config_file
from edge_vlm_export.families.jina_vlm.config import read_settings
from edge_vlm_export.families.jina_vlm.family import FAMILY

from edge_vlm.bundle.json_text import shorten
from tests.conftest import GOLDEN
from tests.export_helpers import copy_checkpoint, edit_json, refused, set_key

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER = "tokenizer.json"
VISION_ATTENTION = "vision_config.block_config.attn_config"
POOLING_ATTENTION = "vision_config.vl_connector_config.attn_pooling_config"
TEXT_ATTENTION = "text_config.block_config.attn_config"
SPLIT = "pre_tokenizer.pretokenizers.0"

UNSUPPORTED: list[tuple[str, str, Any]] = [
    (CONFIG, "model_type", "blip"),
    (CONFIG, "vision_config.linear_patch_embedding", False),
    (CONFIG, "vision_config.patch_embedding_bias", False),
    (CONFIG, "vision_config.use_absolute_positional_embeddings", False),
    (CONFIG, "vision_config.use_cls_token", True),
    (CONFIG, "vision_config.pre_lnorm", True),
    (CONFIG, "vision_config.post_lnorm", False),
    (CONFIG, "vision_config.n_channels", 1),
    (CONFIG, "vision_config.vit_layers", []),
    (CONFIG, "vision_config.vit_layers", [-8, -4]),
    (CONFIG, "vision_config.vit_layers", [7]),
    (CONFIG, "vision_config.vit_layers", ["-4"]),
    (CONFIG, "vision_config.block_config.attn_lscale_init", 0.1),
    (CONFIG, "vision_config.block_config.ffn_lscale_init", 0.1),
    (CONFIG, "vision_config.block_config.postnorm", True),
    (CONFIG, "vision_config.block_config.lnorm_config.type", "rms"),
    (CONFIG, "vision_config.block_config.lnorm_config.with_affine", False),
    (CONFIG, "vision_config.block_config.lnorm_config.bias", False),
    (CONFIG, "vision_config.block_config.lnorm_config.eps", 0),
    (CONFIG, "vision_config.block_config.ffn_config.activation_type", "gelu"),
    (CONFIG, "vision_config.block_config.ffn_config.gated_activation", True),
    (CONFIG, "vision_config.block_config.ffn_config.bias", False),
    (CONFIG, "vision_config.block_config.ffn_config.inner_lnorm", True),
    (CONFIG, "vision_config.block_config.ffn_config.size", None),
    (CONFIG, "vision_config.vl_connector_config.padding_embed_type", "pad_embed"),
    (CONFIG, "vision_config.vl_connector_config.pooling_type", "attention"),
    (CONFIG, "vision_config.vl_connector_config.projector_type", "linear"),
    *(
        (CONFIG, f"vision_config.vl_connector_config.mlp_projector_config.{key}", value)
        for key, value in (
            ("activation_type", "gelu"),
            ("gated_activation", False),
            ("bias", True),
            ("inner_lnorm", True),
        )
    ),
    *(
        (CONFIG, f"{section}.{key}", value)
        for section in (VISION_ATTENTION, POOLING_ATTENTION, TEXT_ATTENTION)
        for key, value in (
            ("softmax_scale", 0.1),
            ("sliding_window", 512),
            ("clip_qkv", 8.0),
            ("inner_lnorm", True),
            ("o_lnorm", True),
            ("v_lnorm", True),
            ("n_heads", 0),
            ("head_dim", -16),
        )
    ),
    *(
        (CONFIG, f"{section}.{key}", value)
        for section in (VISION_ATTENTION, POOLING_ATTENTION)
        for key, value in (
            ("n_kv_heads", 2),
            ("q_bias", False),
            ("k_bias", False),
            ("v_bias", False),
            ("o_bias", False),
            ("q_lnorm", True),
            ("k_lnorm", True),
        )
    ),
    *((CONFIG, f"{TEXT_ATTENTION}.{key}_bias", True) for key in "qkvo"),
    (CONFIG, f"{TEXT_ATTENTION}.q_lnorm", False),
    (CONFIG, f"{TEXT_ATTENTION}.k_lnorm", False),
    (CONFIG, f"{TEXT_ATTENTION}.qkv_lnorm_on_heads", False),
    (CONFIG, f"{TEXT_ATTENTION}.n_kv_heads", 3),
    (CONFIG, f"{TEXT_ATTENTION}.head_dim", 63),
    (CONFIG, f"{TEXT_ATTENTION}.lnorm_config.type", "default"),
    (CONFIG, f"{TEXT_ATTENTION}.lnorm_config.eps", 1e-5),
    (CONFIG, "text_config.rope", False),
    (CONFIG, "text_config.rope_theta", 0),
    (CONFIG, "text_config.rope_scaling", {"type": "yarn", "factor": 4.0}),
    (CONFIG, "text_config.partial_rotary_factor", 0.5),
    (CONFIG, "text_config.normalize_input_embeds", True),
    (CONFIG, "text_config.num_hidden_layers", 4),
    (CONFIG, "text_config.embedding_size", 700),
    (CONFIG, "text_config.max_position_embeddings", 100),
    (CONFIG, "text_config.additional_vocab_size", 0),
    (CONFIG, "text_config.block_config.attn_lscale_init", 0.1),
    (CONFIG, "text_config.block_config.ffn_lscale_init", 0.1),
    (CONFIG, "text_config.block_config.postnorm", True),
    (CONFIG, "text_config.block_config.lnorm_config.type", "default"),
    (CONFIG, "text_config.block_config.lnorm_config.with_affine", False),
    (CONFIG, "text_config.block_config.lnorm_config.bias", True),
    (CONFIG, "text_config.block_config.ffn_config.activation_type", "gelu"),
    (CONFIG, "text_config.block_config.ffn_config.gated_activation", False),
    (CONFIG, "text_config.block_config.ffn_config.bias", True),
    (CONFIG, "text_config.block_config.ffn_config.inner_lnorm", True),
    (CONFIG, "tie_word_embeddings", "yes"),
    (CONFIG, "vision_config.output_size", 128),
    (CONFIG, "vision_config.input_size", [378, 364]),
    (CONFIG, "vision_config.patch_size", 7),
    (CONFIG, "vision_config.vl_connector_config.pooling_h", 3),
    (CONFIG, "vision_config.vl_connector_config.pooling_w", 3),
    (PREPROCESSOR, "cropping_method", "resize"),
    (PREPROCESSOR, "normalization_method", "mean_std"),
    (PREPROCESSOR, "image_min", 0.0),
    (PREPROCESSOR, "image_max", 255.0),
    (PREPROCESSOR, "interpolation", "bicubic"),
    (PREPROCESSOR, "random_interpolation", True),
    (PREPROCESSOR, "antialias", True),
    (PREPROCESSOR, "resize_in_float32", True),
    (PREPROCESSOR, "preserve_aspect_ratio", True),
    (PREPROCESSOR, "do_resize", False),
    (PREPROCESSOR, "do_convert_rgb", False),
    (PREPROCESSOR, "padding_mask", True),
    (PREPROCESSOR, "patch_size", "14"),
    (PREPROCESSOR, "max_crops", 0),
    (PREPROCESSOR, "max_pixels", 1 << 40),
    (PREPROCESSOR, "min_pixels", True),
    (PREPROCESSOR, "overlap_margins", [4]),
    (PREPROCESSOR, "base_input_size", [378, 378, 3]),
    (PREPROCESSOR, "use_column_tokens", 1),
    (PREPROCESSOR, "crop_size", 336),
    (PREPROCESSOR, "image_base_patch_h", 24),
    (PREPROCESSOR, "image_base_patch_w", 24),
    (PREPROCESSOR, "tokens_per_image", 144),
    (PREPROCESSOR, "size.shortest_edge", 1),
    (PREPROCESSOR, "size.longest_edge", 1),
    (PREPROCESSOR, "start_token_id", 5),
    (PREPROCESSOR, "end_token_id", 5),
    (PREPROCESSOR, "patch_token_id", 5),
    (PREPROCESSOR, "column_token_id", 5),
    ("processor_config.json", "always_start_with_space", "yes"),
    ("generation_config.json", "eos_token_id", []),
    ("generation_config.json", "eos_token_id", [740, 896]),
    ("generation_config.json", "eos_token_id", "740"),
    ("tokenizer_config.json", "bos_token", "<s>"),
    (TOKENIZER, "model.type", "Unigram"),
    (TOKENIZER, "model.dropout", 0.1),
    (TOKENIZER, "model.unk_token", "<unk>"),
    (TOKENIZER, "model.continuing_subword_prefix", "##"),
    (TOKENIZER, "model.end_of_word_suffix", "</w>"),
    (TOKENIZER, "model.byte_fallback", True),
    (TOKENIZER, "model.ignore_merges", True),
    (TOKENIZER, "normalizer.type", "NFKC"),
    (TOKENIZER, "pre_tokenizer.type", "Whitespace"),
    (TOKENIZER, "pre_tokenizer.pretokenizers", []),
    (TOKENIZER, f"{SPLIT}.type", "Digits"),
    (TOKENIZER, f"{SPLIT}.behavior", "Removed"),
    (TOKENIZER, f"{SPLIT}.invert", True),
    (TOKENIZER, f"{SPLIT}.pattern.Regex", r"\p{N}{1,3}"),
    (TOKENIZER, "pre_tokenizer.pretokenizers.1.type", "Metaspace"),
    (TOKENIZER, "pre_tokenizer.pretokenizers.1.add_prefix_space", True),
    (TOKENIZER, "pre_tokenizer.pretokenizers.1.use_regex", True),
    (TOKENIZER, "added_tokens.3.lstrip", True),
    (TOKENIZER, "added_tokens.3.rstrip", True),
    (TOKENIZER, "added_tokens.3.single_word", True),
    (TOKENIZER, "added_tokens.3.id", 896),
    (TOKENIZER, "added_tokens.3.id", 7.0),
    (TOKENIZER, "added_tokens.3.special", None),
    (TOKENIZER, "added_tokens.3.content", ""),
    (TOKENIZER, "added_tokens.3.content", "<|start|>"),
    (TOKENIZER, "added_tokens", {}),
    (TOKENIZER, "model.vocab", []),
    (TOKENIZER, "model.merges", None),
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint whose settings may be changed."""
    return copy_checkpoint("tiny-378", tmp_path / "checkpoint", link_weights=True)


def test_released_keys_are_read() -> None:
    settings = read_settings(GOLDEN / "tiny-378" / "checkpoint")
    assert settings.vision.used_states == (5, 3)
    assert settings.vision.n_used_layers == 6
    assert not settings.vision.uses_final_norm
    assert settings.stop_ids == (740, 742)
    assert settings.text.n_ids == 896
    tied = read_settings(GOLDEN / "tiny-126-tied" / "checkpoint")
    assert tied.vision.used_states == (4, 2)
    assert tied.vision.uses_final_norm
    assert tied.image_processor.tokens_per_crop == 25


@pytest.mark.parametrize(("file", "key", "value"), UNSUPPORTED)
def test_an_unsupported_value_is_named(checkpoint: Path, file: str, key: str, value: Any) -> None:
    set_key(checkpoint / file, key, value)
    last = key.split(".")[-1]
    message = refused(checkpoint, file, last)
    shown = shorten(value)
    assert shown in message or value is None
    section = key.rpartition(".")[0]
    assert section.replace(".0", "[0]").replace(".1", "[1]").replace(".3", "[3]") in message


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("overlap_margins", "no window"),
        ("token_length_h", "contradicts patches and pooling"),
        ("base_input_size", "not a multiple of patch_size"),
        ("min_pixels", "larger than max_pixels"),
    ],
)
def test_impossible_geometry_is_refused(checkpoint: Path, key: str, message: str) -> None:
    values = {
        "overlap_margins": [20, 20],
        "token_length_h": 15,
        "base_input_size": [380, 378],
        "min_pixels": 1003521,
    }
    set_key(checkpoint / PREPROCESSOR, key, values[key])
    refused(checkpoint, PREPROCESSOR, message)


@pytest.mark.parametrize(
    "key",
    ["text_config", "vision_config.hidden_size", f"{TEXT_ATTENTION}.n_heads"],
)
def test_a_missing_key_is_named(checkpoint: Path, key: str) -> None:
    section, _, last = key.rpartition(".")

    def drop(data: Any) -> None:
        for part in section.split(".") if section else []:
            data = data[part]
        del data[last]

    edit_json(checkpoint / CONFIG, drop)
    refused(checkpoint, CONFIG, f"{key} is missing")


def test_head_dim_may_be_absent(checkpoint: Path) -> None:
    set_key(checkpoint / CONFIG, f"{TEXT_ATTENTION}.head_dim", None)
    assert read_settings(checkpoint).text.attention.head_dim == 64
    set_key(checkpoint / CONFIG, f"{TEXT_ATTENTION}.n_heads", 6)
    refused(checkpoint, f"{TEXT_ATTENTION}.n_heads", "does not divide")


@pytest.mark.parametrize(
    "name",
    [CONFIG, PREPROCESSOR, "processor_config.json", TOKENIZER],
)
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    refused(checkpoint, name, "is missing")


@pytest.mark.parametrize("name", [CONFIG, PREPROCESSOR, TOKENIZER])
@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b'{"a": 1, "a": 1}', "twice"),
        (b"\xff\xfe{\0}\0", "not UTF-8"),
        (b'{"a": ' * 200_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_broken_json_is_refused(checkpoint: Path, name: str, text: bytes, fragment: str) -> None:
    (checkpoint / name).write_bytes(text)
    refused(checkpoint, name, fragment)


def test_a_huge_file_is_refused_before_it_is_parsed(checkpoint: Path) -> None:
    with (checkpoint / CONFIG).open("ab") as file:
        file.write(b" " * config_file.MAX_JSON_BYTES)
    refused(checkpoint, CONFIG, "larger than 4 MiB")


def test_deeply_nested_values_are_refused_in_one_line(checkpoint: Path) -> None:
    nested: Any = 1
    for _ in range(400):
        nested = [nested] * 1
    set_key(checkpoint / CONFIG, "model_type", nested)
    refused(checkpoint, CONFIG, "model_type")


def test_the_template_may_be_in_the_tokenizer_config(checkpoint: Path) -> None:
    path = checkpoint / "chat_template.jinja"
    template = path.read_text(encoding="utf-8")
    path.unlink()
    config = checkpoint / "tokenizer_config.json"
    set_key(config, "chat_template", template)
    assert read_settings(checkpoint).chat_template == template
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    set_key(config, "chat_template", named)
    assert read_settings(checkpoint).chat_template == template


@pytest.mark.parametrize("value", [None, 7, [], [{"name": "rag", "template": "x"}], "", "\0"])
def test_a_missing_template_is_refused(checkpoint: Path, value: Any) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    set_key(checkpoint / "tokenizer_config.json", "chat_template", value)
    refused(checkpoint, "template")


def test_a_checkpoint_without_template_files_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    refused(checkpoint, "chat_template.jinja", "is missing")


def test_a_template_that_is_no_text_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    set_key(checkpoint / "tokenizer_config.json", "chat_template", "a\ud800")
    refused(checkpoint, "not valid Unicode")


def test_a_huge_template_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("x" * (1 << 20) + "y")
    refused(checkpoint, "chat_template.jinja", "larger than 1 MiB")


def test_the_first_token_is_bos_or_else_eos(checkpoint: Path) -> None:
    settings = read_settings(checkpoint)
    config = checkpoint / "tokenizer_config.json"
    set_key(config, "bos_token", "<|im_start|>")
    assert FAMILY.read_tokenizer(checkpoint, settings).bos == 741
    set_key(config, "bos_token", None)
    set_key(config, "eos_token", {"content": "<|im_end|>"})
    edit_json(checkpoint / "special_tokens_map.json", lambda data: data.pop("bos_token"))
    assert FAMILY.read_tokenizer(checkpoint, settings).bos == 742
    config.unlink()
    assert FAMILY.read_tokenizer(checkpoint, settings).bos == 740
    (checkpoint / "special_tokens_map.json").unlink()
    refused(checkpoint, TOKENIZER, "names a bos_token")


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("model.merges.5", ["a"], "merges[5]"),
        ("model.merges.5", "a b c", "merges[5]"),
        ("model.merges.5", ["a", "\u00e9\u00e9"], "merges[5]"),
        ("model.vocab.!", 896, "896 ids"),
        ("model.vocab.!", -1, "-1"),
        ("model.vocab.!", 1, "share id 1"),
        ("model.vocab.x\0y", 760, "no valid text"),
        ("model.vocab.\ud800", 760, "no valid text"),
        ("model.vocab.[PAD800]", 801, "has two ids"),
        ("added_tokens.3.id", 2, "added token"),
        ("added_tokens.3", 7, "added_tokens[3]"),
        ("added_tokens.3.content", "a\0b", "no valid text"),
        ("added_tokens.3.content", "<|im_end|>", "has two ids"),
    ],
)
def test_a_broken_vocabulary_is_refused(
    checkpoint: Path, key: str, value: Any, fragment: str
) -> None:
    set_key(checkpoint / TOKENIZER, key, value)
    refused(checkpoint, TOKENIZER, fragment)


def test_a_vocabulary_without_a_byte_is_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / TOKENIZER, lambda data: data["model"]["vocab"].pop("\u0100"))
    refused(checkpoint, TOKENIZER, "lacks 1 of the 256 byte tokens")


@pytest.mark.parametrize("token", ["<im_start>", "<im_col>", "<|image|>"])
def test_a_vocabulary_without_an_image_token_is_refused(checkpoint: Path, token: str) -> None:
    def drop(data: Any) -> None:
        data["added_tokens"] = [item for item in data["added_tokens"] if item["content"] != token]

    edit_json(checkpoint / TOKENIZER, drop)
    refused(checkpoint, TOKENIZER, token)


def test_both_spellings_of_the_splitting_rule_are_read(checkpoint: Path) -> None:
    path = checkpoint / TOKENIZER
    rule = json.loads(path.read_text(encoding="utf-8"))["pre_tokenizer"]["pretokenizers"][0]
    regex = rule["pattern"]["Regex"].replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    )
    assert regex != rule["pattern"]["Regex"]
    set_key(path, f"{SPLIT}.pattern.Regex", regex)
    FAMILY.read_tokenizer(checkpoint, read_settings(checkpoint))


def test_the_normalizer_may_be_absent(checkpoint: Path) -> None:
    settings = read_settings(checkpoint)
    assert FAMILY.read_tokenizer(checkpoint, settings).normalizer == "NFC"
    set_key(checkpoint / TOKENIZER, "normalizer", None)
    assert FAMILY.read_tokenizer(checkpoint, settings).normalizer is None


def test_merges_may_be_written_as_text(checkpoint: Path) -> None:
    settings = read_settings(checkpoint)
    merges = FAMILY.read_tokenizer(checkpoint, settings).merges
    assert len(merges) == 484
    set_key(checkpoint / TOKENIZER, "model.merges", list(merges))
    assert FAMILY.read_tokenizer(checkpoint, settings).merges == merges
