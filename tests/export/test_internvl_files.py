"""InternVL checkpoints as they occur, and what is said of those that cannot be exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_vlm_export.families.internvl.settings import read_settings
from edge_vlm_export.families.opened import Description, Model
from edge_vlm_export.synthetic.checkpoint import config_folder, synthesize

from edge_vlm.families.internvl.released import IMAGE_PROCESSOR, RELEASED
from tests.conftest import GOLDEN, Run, assert_one_line, load_golden
from tests.export_helpers import copy_checkpoint, edit_json, edit_tensors, refused, set_key

pytestmark = pytest.mark.engine  # it exports models

NAME, CHAT = "internvl", "internvl-chat"
MODEL = load_golden(NAME)
TEXT = "language_model.model."


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy that may be changed, in transformers' layout."""
    return copy_checkpoint(NAME, tmp_path / "checkpoint")


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A copy that may be changed, in the original layout."""
    return copy_checkpoint(CHAT, tmp_path / "checkpoint")


def in_memory_spelling(name: str) -> str:
    """As transformers 4.52 and later call a tensor that is loaded."""
    if name.endswith("lm_head.weight"):
        return "lm_head.weight"
    return "model." + name.replace(TEXT, "language_model.")


def saved_spelling(name: str) -> str:
    """As transformers 5.5 writes it."""
    return name if "lm_head" in name else f"model.{name}"


@pytest.mark.parametrize("spelling", [in_memory_spelling, saved_spelling])
def test_every_spelling_of_the_tensors_is_read(
    spelling: Callable[[str], str], checkpoint: Path
) -> None:
    def respell(tensors: Any) -> None:
        for name in list(tensors):
            tensors[spelling(name)] = tensors.pop(name)

    expected = Model(MODEL.checkpoint)
    edit_tensors(checkpoint, respell)
    found = Model(checkpoint)
    assert not found.tied
    assert found.tensors.tensors.keys() == expected.tensors.tensors.keys()
    name = "language_model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(found.tensors[name].read(), expected.tensors[name].read())


def test_other_spellings_of_settings(checkpoint: Path) -> None:
    """As transformers 5 writes them: one file for both processors, rope_parameters."""
    expected = read_settings(checkpoint)

    def newer(config: Any) -> None:
        text = config["text_config"]
        scaling = {"rope_type": "dynamic", "factor": 2.0}
        text["rope_parameters"] = {**scaling, "rope_theta": text.pop("rope_theta")}
        text["layer_types"] = ["full_attention"] * 3
        text["rope_scaling"] = text["head_dim"] = None

    edit_json(checkpoint / "config.json", newer)
    images = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
    (checkpoint / "preprocessor_config.json").unlink()
    set_key(checkpoint / "processor_config.json", "image_processor", images)
    (checkpoint / "generation_config.json").unlink()  # config.json tells the same
    found = read_settings(checkpoint)
    for part in ("image_processor", "text", "stop_ids", "chat_template"):
        assert getattr(found, part) == getattr(expected, part)


def test_an_early_template_says_image(checkpoint: Path) -> None:
    expected = read_settings(checkpoint).chat_template
    path = checkpoint / "chat_template.jinja"
    early = expected.replace("<IMG_CONTEXT>", "<image>")
    path.write_text(early, encoding="utf-8")
    assert read_settings(checkpoint).chat_template == expected


def test_the_original_code_stops_at_the_end_of_a_turn(chat: Path) -> None:
    """Whatever the files say, and whichever of them names that token."""
    set_key(chat / "config.json", "llm_config.eos_token_id", 540)
    set_key(chat / "generation_config.json", "eos_token_id", [540, 541])
    assert read_settings(chat).stop_ids == (542,)
    (chat / "added_tokens.json").unlink()
    assert read_settings(chat).stop_ids == (542,)


def test_both_sets_of_tokenizer_files_are_one_tokenizer(chat: Path) -> None:
    published = Model(MODEL.checkpoint).tokenizer
    for files in ((), ("added_tokens.json",), ("special_tokens_map.json",)):
        for name in files:
            (chat / name).unlink()
        found = Model(chat).tokenizer
        for part in ("tokens", "types", "merges", "special", "normalizer", "pre", "bos"):
            assert getattr(found, part) == getattr(published, part), part


def test_special_tokens_are_told_by_their_roles(chat: Path) -> None:
    """As tokenizers were written before transformers 4.33."""
    edit_json(chat / "tokenizer_config.json", lambda data: data.pop("added_tokens_decoder"))
    expected, found = Model(MODEL.checkpoint).tokenizer, Model(chat).tokenizer
    assert found.special == expected.special
    assert found.types == expected.types


def test_a_folder_with_both_kinds_of_tokenizer_files(chat: Path) -> None:
    source = MODEL.checkpoint / "tokenizer.json"
    (chat / "tokenizer.json").write_bytes(source.read_bytes())
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (chat / name).unlink()
    assert Model(chat).tokenizer.tokens == Model(MODEL.checkpoint).tokenizer.tokens
    assert read_settings(chat).stop_ids == (542,)


def test_absent_keys_have_the_class_s_defaults(checkpoint: Path, tmp_path: Path) -> None:
    def less(config: Any) -> None:
        for key in ("vision_feature_layer", "downsample_ratio", "image_seq_length"):
            del config[key]

    expected = read_settings(checkpoint)
    edit_json(checkpoint / "config.json", less)
    (checkpoint / "processor_config.json").unlink()
    for key in ("min_patches", "max_patches", "resample"):
        edit_json(checkpoint / "preprocessor_config.json", lambda data, key=key: data.pop(key))
    assert read_settings(checkpoint).image_processor == expected.image_processor
    assert expected.image_processor == IMAGE_PROCESSOR
    original = copy_checkpoint(CHAT, tmp_path / "chat")
    for key in ("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail"):
        edit_json(original / "config.json", lambda data, key=key: data.pop(key))
    images = read_settings(original).image_processor
    assert (images.min_crops, images.max_crops, images.use_thumbnail) == (1, 6, False)


@pytest.mark.parametrize(
    ("file", "key", "value", "fragments"),
    [
        ("config", "model_type", "internvl3", ("model_type", "internvl, internvl_chat")),
        ("config", "downsample_ratio", 0.25, ("downsample_ratio is 0.25",)),
        ("config", "vision_feature_layer", -9, ("vision_feature_layer is -9", "has 3")),
        ("config", "vision_feature_layer", [-1, -2], ("vision_feature_layer",)),
        ("config", "vision_feature_select_strategy", "full", ("select_strategy", '"default"')),
        ("config", "projector_hidden_act", "relu", ("projector_hidden_act", '"gelu"')),
        ("config", "image_seq_length", 64, ("image_seq_length is 64", "256")),
        ("config", "image_token_id", 563, ("image_token_id is 563", "564")),
        ("config", "image_token_id", None, ("image_token_id is null",)),
        ("config", "text_config.model_type", "qwen3", ("text_config.model_type", '"qwen3"')),
        ("config", "text_config.model_type", "internlm2", ('this layout calls it "llama"',)),
        ("config", "text_config.hidden_act", "gelu", ("text_config.hidden_act", '"silu"')),
        ("config", "text_config.use_sliding_window", True, ("use_sliding_window",)),
        ("config", "text_config.rope_scaling", {"type": "linear"}, ("rope_scaling", '"linear"')),
        ("config", "text_config.attention_bias", False, ("attention_bias is false",)),
        ("config", "text_config.rope_theta", None, ("rope_theta",)),
        ("config", "text_config.logit_softcap", 30.0, ("logit_softcap is 30.0", "not known")),
        ("config", "hidden_size", 896, ("hidden_size is 896", "128")),
        ("config", "text_config.layer_types", ["sliding_attention"], ("text_config.layer_types",)),
        ("config", "text_config.num_attention_heads", 3, ("heads is 3, which does not divide",)),
        ("config", "text_config.hidden_size", None, ("text_config.hidden_size is missing",)),
        ("config", "text_config.intermediate_size", 193, ("mlp", "193")),
        (
            "config",
            "vision_config.model_type",
            "siglip_vision_model",
            ("vision_config.model_type",),
        ),
        ("config", "vision_config.hidden_act", "quick_gelu", ("vision_config.hidden_act",)),
        ("config", "vision_config.norm_type", "rms_norm", ("norm_type", '"layer_norm"')),
        ("config", "vision_config.use_qk_norm", True, ("use_qk_norm is true", "must be False")),
        (
            "config",
            "vision_config.attention_bias",
            False,
            ("attention_bias is false", "must be True"),
        ),
        ("config", "vision_config.use_mean_pooling", False, ("use_mean_pooling is false",)),
        ("config", "vision_config.image_size", [448, 896], ("vision_config.image_size",)),
        ("config", "vision_config.image_size", 392, ("size is 448x448", "392")),
        ("config", "vision_config.image_size", 450, ("image_size is 450", "multiple of 28")),
        ("config", "vision_config.num_hidden_layers", 2, ("encoder.layer.2", "not part of")),
        ("preprocessor_config", "image_processor_type", "CLIPImageProcessor", ("CLIPImage",)),
        ("preprocessor_config", "max_patches", 0, ("max_patches is 0",)),
        ("preprocessor_config", "min_patches", 13, ("min_crops is larger than max_crops",)),
        ("preprocessor_config", "resample", 2, ("resample is 2", "must be 3")),
        ("preprocessor_config", "image_std", [0.5, 0.5], ("image_std",)),
        ("processor_config", "image_seq_length", 64, ("image_seq_length is 64", "256")),
        ("generation_config", "eos_token_id", 571, ("eos_token_id is 571",)),
        ("tokenizer", "pre_tokenizer.pretokenizers.0.pattern.Regex", ".", ("rule of qwen2",)),
        ("tokenizer", "added_tokens.22.special", False, ("no special token <img>",)),
    ],
)
def test_what_is_not_supported_is_named(
    checkpoint: Path, file: str, key: str, value: Any, fragments: tuple[str, ...]
) -> None:
    set_key(checkpoint / f"{file}.json", key, value)
    refused(checkpoint, *fragments)


@pytest.mark.parametrize(
    ("file", "key", "value", "fragments"),
    [
        ("config", "ps_version", "v1", ("ps_version", "v2")),
        ("config", "ps_version", None, ("ps_version", "v2")),
        ("config", "template", "internlm2-chat", ("template", "internvl2_5")),
        ("config", "template", None, ("template", "internvl2_5")),
        ("config", "select_layer", -9, ("select_layer is -9", "has 3")),
        ("config", "force_image_size", 224, ("force_image_size is 224", "448")),
        ("config", "dynamic_image_size", False, ("dynamic_image_size", "true")),
        ("config", "pad2square", True, ("pad2square is true",)),
        ("config", "use_llm_lora", 16, ("use_llm_lora is 16",)),
        ("config", "llm_config.model_type", "llama", ("llm_config.model_type", "internlm2")),
        ("config", "llm_config.model_type", "phi3", ("llm_config.model_type", "internlm2")),
        ("config", "vision_config.qk_normalization", True, ("qk_normalization is true",)),
        ("config", "vision_config.qkv_bias", None, ("vision_config.qkv_bias is null",)),
        ("config", "vision_config.norm_type", None, ("norm_type is missing",)),
        ("config", "vision_config.use_moe", True, ("use_moe is true",)),
        ("config", "max_dynamic_patch", 500, ("max_dynamic_patch is 500",)),
        ("added_tokens", "<img>", "562", ("<img>", "expected an id")),
        ("vocab", "a", 100_000, ("100000", "571 ids")),
    ],
)
def test_what_is_not_supported_is_named_in_the_original_layout(
    chat: Path, file: str, key: str, value: Any, fragments: tuple[str, ...]
) -> None:
    set_key(chat / f"{file}.json", key, value)
    refused(chat, *fragments)


def test_keys_of_released_files_that_change_nothing(chat: Path) -> None:
    def released(config: Any) -> None:
        config |= {"image_fold": 1, "hidden_size": 128, "output_attentions": False}
        mixture = {"num_experts": 8, "moe_coeff_ratio": 0.5, "noisy_gate_policy": "RSample_before"}
        config["vision_config"] |= {"use_moe": False, "capacity_factor": 1.2, **mixture}
        config["llm_config"] |= {"attn_implementation": "flash_attention_2", "moe_config": None}

    expected = read_settings(chat)
    edit_json(chat / "config.json", released)
    assert read_settings(chat).text == expected.text


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named(chat: Path, name: str) -> None:
    (chat / name).unlink()
    refused(chat, name)


@pytest.mark.parametrize(
    "name",
    [
        "multi_modal_projector.layer_norm.bias",
        "vision_tower.embeddings.cls_token",
        "vision_tower.encoder.layer.2.lambda_2",
        "language_model.lm_head.weight",
        "language_model.model.layers.1.self_attn.k_proj.bias",
    ],
)
def test_a_missing_tensor_is_named(checkpoint: Path, name: str) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
    refused(checkpoint, "has no tensor", name.replace(TEXT, "language_model."))


@pytest.mark.parametrize("name", ["mlp1.3.weight", "vision_model.encoder.layers.0.ls1"])
def test_a_missing_tensor_of_the_original_layout_is_named(chat: Path, name: str) -> None:
    edit_tensors(chat, lambda tensors: tensors.pop(name))
    refused(chat, "has no tensor", name)


def test_blocks_that_nothing_reads_are_left_out(checkpoint: Path) -> None:
    set_key(checkpoint / "config.json", "vision_feature_layer", -2)
    model = Model(checkpoint)
    assert len(model.tower.stages) == 1 + 2 + 1
    assert model.family.vision_sizes(model.settings, "fp32").n_layers == 2


def test_an_unsupported_checkpoint_is_one_line(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    set_key(checkpoint / "config.json", "text_config.model_type", "gemma")
    failed = run("export", checkpoint, "--out", tmp_path / "out")
    assert_one_line(failed, 2, "text_config.model_type", "gemma")


def test_the_released_config_has_the_released_sizes() -> None:
    model = Description(config_folder("internvl2.5-1b"))
    released = RELEASED["internvl2.5-1b"]
    assert model.settings.image_processor == released.processor
    assert model.family.vision_sizes(model.settings, "fp16") == released.vision
    text, decoder = model.text, released.decoder
    sizes = (text.n_layers, text.hidden_size, text.ffn_size, text.vocab_size)
    assert sizes == (
        decoder.n_layers,
        decoder.hidden_size,
        decoder.ffn_size,
        decoder.vocab_size,
    )
    assert model.settings.stop_ids == (151645,)
    shapes = model.shapes()
    assert shapes["vision_tower.embeddings.position_embeddings"] == (1, 1025, 1024)
    assert shapes["multi_modal_projector.linear_1.weight"] == (896, 4096)
    tokens = model.family.made_up_tokens(model.settings)
    assert (tokens["<|im_end|>"], tokens["<img>"], tokens["</box>"]) == (151645, 151665, 151673)
    assert model.settings.config.image_token_id == tokens["<IMG_CONTEXT>"]


@pytest.mark.parametrize("name", [NAME, CHAT])
def test_a_random_checkpoint_has_the_tensors_of_a_published_one(name: str, tmp_path: Path) -> None:
    source = GOLDEN / name / "checkpoint"
    out = synthesize(source, tmp_path / "random")
    original, random = Model(source), Model(out)
    assert {n: t.shape for n, t in random.tensors.tensors.items()} == {
        n: t.shape for n, t in original.tensors.tensors.items()
    }
    assert random.tokenizer.special.keys() >= original.tokenizer.special.keys()
