"""LLaVA-1.5 and LLaVA-NeXT checkpoints as they occur, and what is said of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from edge_vlm_export.families.opened import Description, Model
from edge_vlm_export.families.registry import family_of

from tests.conftest import GOLDEN, Run, assert_one_line
from tests.export_helpers import (
    copy_checkpoint,
    edit_json,
    edit_tensors,
    export_exact,
    refused,
    set_key,
)

pytestmark = pytest.mark.engine  # it exports models

NAMES = ("llava-1.5", "llava-next")
each = pytest.mark.parametrize("name", NAMES)
Copy = Callable[[str], Path]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A checkpoint that may be changed."""
    return lambda name: copy_checkpoint(name, tmp_path / "checkpoint")


def in_memory_spelling(name: str) -> str:
    """As transformers 4.52 and later call a tensor that is loaded."""
    if "lm_head" in name:
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


def saved_spelling(name: str) -> str:
    """As transformers 5.5 writes it."""
    return name if "lm_head" in name else f"model.{name}"


@pytest.mark.parametrize("spelling", [in_memory_spelling, saved_spelling])
@each
def test_every_spelling_of_the_tensors_is_read(
    name: str, spelling: Callable[[str], str], copy: Copy
) -> None:
    def respell(tensors: Any) -> None:
        for stored in list(tensors):
            tensors[spelling(stored)] = tensors.pop(stored)
        # Older versions saved the positions, which are int64 and always the same.
        tensors["model.vision_tower.vision_model.embeddings.position_ids"] = np.arange(577)[None]

    expected, checkpoint = Model(GOLDEN / name / "checkpoint"), copy(name)
    edit_tensors(checkpoint, respell)
    found = Model(checkpoint)
    assert not found.tied
    assert found.tensors.tensors.keys() == expected.tensors.tensors.keys()
    part = "language_model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(found.tensors[part].read(), expected.tensors[part].read())


@each
def test_other_spellings_of_settings(name: str, copy: Copy) -> None:
    """As transformers 5 writes them: one file for both processors, rope_parameters, a .jinja."""
    checkpoint = copy(name)
    expected = Description(checkpoint).settings

    def newer(config: Any) -> None:
        config["image_token_id"] = config.pop("image_token_index")
        text = config["text_config"]
        theta = text.pop("rope_theta", 10000.0)
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        text["rope_scaling"] = text["head_dim"] = None
        text |= {
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "dtype": "float32",
        }
        text |= {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
        config["vision_config"] |= {"initializer_factor": 1.0, "attention_dropout": 0.0}
        config |= {"image_seq_length": 576, "multimodal_projector_bias": True, "dtype": "float32"}

    edit_json(checkpoint / "config.json", newer)
    images = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
    (checkpoint / "preprocessor_config.json").unlink()
    images["image_processor_type"] += "Fast"
    images |= {"data_format": "channels_first", "input_data_format": None, "pad_size": None}
    set_key(checkpoint / "processor_config.json", "image_processor", images)
    template = json.loads((checkpoint / "chat_template.json").read_text(encoding="utf-8"))
    (checkpoint / "chat_template.json").unlink()
    path = checkpoint / "chat_template.jinja"
    path.write_text(template["chat_template"], encoding="utf-8")
    (checkpoint / "generation_config.json").unlink()  # the class's default is the same
    found = Description(checkpoint).settings
    for part in ("image_processor", "text", "stop_ids", "chat_template", "image_token"):
        assert getattr(found, part) == getattr(expected, part)


def test_absent_keys_have_the_classes_defaults(copy: Copy) -> None:
    """The released files leave out most sizes of the decoder."""
    checkpoint = copy("llava-1.5")
    (checkpoint / "processor_config.json").unlink()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

    def less(config: Any) -> None:
        for key in (*sizes, "max_position_embeddings", "rms_norm_eps"):
            del config["text_config"][key]
        del config["vision_feature_layer"], config["vision_feature_select_strategy"]

    edit_json(checkpoint / "config.json", less)
    settings = Description(checkpoint).settings
    text = settings.text
    assert (text.n_layers, text.hidden_size, text.ffn_size) == (32, 4096, 11008)
    heads = text.attention
    assert (heads.n_heads, heads.n_kv_heads, heads.head_dim) == (32, 32, 128)
    assert (text.norm_eps, text.rope_theta, text.max_sequence_length) == (1e-6, 10000.0, 2048)
    assert settings.config.used_layers == 3


def test_absent_keys_of_mistral(copy: Copy) -> None:
    """A window is none where it is null, and 4,096 where the key is absent."""
    checkpoint = copy("llava-next")
    edit_json(checkpoint / "preprocessor_config.json", lambda d: d.pop("image_grid_pinpoints"))
    assert Description(checkpoint).text.max_sequence_length == 32768
    assert Description(checkpoint).text.rope_theta == 1e6

    def less(config: Any) -> None:
        for key in ("num_key_value_heads", "hidden_size", "num_attention_heads", "sliding_window"):
            del config["text_config"][key]
        del config["text_config"]["intermediate_size"], config["image_grid_pinpoints"]

    edit_json(checkpoint / "config.json", less)
    text = Description(checkpoint).text
    assert (text.ffn_size, text.attention.n_kv_heads, text.attention.head_dim) == (14336, 8, 128)
    assert text.max_sequence_length == 4096


def test_a_llama_may_speak_in_llava_next(copy: Copy, tmp_path: Path) -> None:
    """The family's Vicuna members: Llama's defaults instead of Mistral's."""
    checkpoint = copy("llava-next")
    set_key(checkpoint / "config.json", "text_config.model_type", "llama")
    folder = export_exact(checkpoint, tmp_path / "out")
    fields = gguf.GGUFReader(folder / "decoder.gguf").fields
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["llama.rope.freq_base"].contents() == 1e6


@each
def test_queries_and_keys_are_permuted(name: str, bundle: Callable[..., Path]) -> None:
    """By hand, for one row of each head: llama.cpp rotates neighbours, the file is for halves."""
    model = Model(GOLDEN / name / "checkpoint")
    tensors = {t.name: t for t in gguf.GGUFReader(bundle(name) / "decoder.gguf").tensors}
    for part, n_heads in (("q", 4), ("k", 4 if name == "llava-1.5" else 2)):
        stored = model.tensors[f"language_model.layers.0.self_attn.{part}_proj.weight"].read()
        written = np.asarray(tensors[f"blk.0.attn_{part}.weight"].data)
        for head in range(n_heads):
            for place in (0, 1, 15):
                first = 32 * head + place
                pair = written[32 * head + 2 * place :][:2]
                np.testing.assert_array_equal(pair, stored[[first, first + 16]])


PREPROCESSOR, CONFIG = "preprocessor_config", "config"
BOTH: list[tuple[str, str, Any, tuple[str, ...]]] = [
    (CONFIG, "vision_feature_select_strategy", "full", ('must be "default"',)),
    (CONFIG, "vision_feature_layer", -9, ("vision_feature_layer is -9", "has 4")),
    (CONFIG, "vision_feature_layer", [-2, -5], ("vision_feature_layer",)),
    (CONFIG, "projector_hidden_act", "relu", ("projector_hidden_act", '"gelu"')),
    (CONFIG, "multimodal_projector_bias", False, ("multimodal_projector_bias",)),
    (CONFIG, "image_token_index", 561, ("image_token_index is 561", "560")),
    (CONFIG, "image_token_index", 9999, ("image_token_index is 9999", "576 ids")),
    (CONFIG, "vocab_size", 577, ("vocab_size is 577", "576")),
    (CONFIG, "text_config.model_type", "qwen2", ("text_config.model_type", '"llama"')),
    (CONFIG, "text_config.hidden_act", "gelu", ("text_config.hidden_act", '"silu"')),
    (CONFIG, "text_config.attention_bias", True, ("attention_bias",)),
    (CONFIG, "text_config.rope_scaling", {"type": "linear"}, ("rope_scaling", '"default"')),
    (CONFIG, "text_config.num_attention_heads", 3, ("heads is 3, which does not divide",)),
    (CONFIG, "text_config.num_key_value_heads", 3, ("heads is 3, which does not divide 4",)),
    (CONFIG, "text_config.intermediate_size", 257, ("mlp", "257")),
    (CONFIG, "text_config.intermediate_size", None, ("intermediate_size is missing",)),
    (CONFIG, "vision_config.model_type", "siglip_vision_model", ("clip_vision_model",)),
    (CONFIG, "vision_config.hidden_act", "relu", ("vision_config.hidden_act",)),
    (CONFIG, "vision_config.image_size", 224, ("shortest_edge is 336", "224")),
    (CONFIG, "vision_config.num_hidden_layers", 3, ("encoder.layers.3", "not part of")),
    (PREPROCESSOR, "resample", 2, ("resample is 2", "must be 3")),
    (PREPROCESSOR, "rescale_factor", 0.5, ("rescale_factor is 0.5",)),
    (PREPROCESSOR, "image_std", [0.5, 0.5, 0.0], ("image_std",)),
    (PREPROCESSOR, "crop_size", {"height": 224, "width": 336}, ("crop_size.height is 224",)),
    (PREPROCESSOR, "size", {"height": 336, "width": 336}, ("size.height is 336",)),
    (PREPROCESSOR, "do_center_crop", False, ("do_center_crop is false",)),
    (PREPROCESSOR, "image_processor_type", "SiglipImageProcessor", ("SiglipImage",)),
    ("processor_config", "patch_size", 16, ("patch_size is 16", "14")),
    ("processor_config", "num_additional_image_tokens", 0, ("num_additional_image_tokens",)),
    ("processor_config", "image_token", "<picture>", ("no special token <picture>",)),
    ("generation_config", "eos_token_id", 560, ("eos_token_id is 560",)),
    ("chat_template", "chat_template", "", ("chat template",)),
    ("tokenizer", "pre_tokenizer", {"type": "Metaspace"}, ("tokenizer.json: pre_tokenizer is",)),
]
ONE: dict[str, list[tuple[str, str, Any, tuple[str, ...]]]] = {
    "llava-1.5": [
        (CONFIG, "model_type", "llava_next", ("image_processor_type", "LlavaNext")),
        (PREPROCESSOR, "do_pad", True, ("do_pad is true",)),
    ],
    "llava-next": [
        (CONFIG, "model_type", "llava", ("image_grid_pinpoints",)),
        (CONFIG, "use_image_newline_parameter", False, ("use_image_newline_parameter",)),
        (CONFIG, "image_grid_pinpoints", [[336, 336]], ("image_grid_pinpoints", "contradicts")),
        (PREPROCESSOR, "aspect_ratio_setting", "pad", ("aspect_ratio_setting", '"anyres"')),
        (PREPROCESSOR, "do_pad", False, ("do_pad is false",)),
    ],
}


@pytest.mark.parametrize(
    ("name", "file", "key", "value", "fragments"),
    [
        # Each of what both share with one family, by turns.
        *((NAMES[index % 2], *row) for index, row in enumerate(BOTH)),
        *((name, *row) for name, rows in ONE.items() for row in rows),
    ],
)
def test_what_is_not_supported_is_named(
    name: str, file: str, key: str, value: Any, fragments: tuple[str, ...], copy: Copy
) -> None:
    checkpoint = copy(name)
    set_key(checkpoint / f"{file}.json", key, value)
    refused(checkpoint, *fragments)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llava-next", "image_newline"),
        ("llava-1.5", "multi_modal_projector.linear_1.bias"),
        ("llava-1.5", "language_model.model.layers.1.self_attn.k_proj.weight"),
        ("llava-next", "vision_tower.vision_model.encoder.layers.2.mlp.fc2.weight"),
        ("llava-1.5", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("llava-next", "vision_tower.vision_model.embeddings.class_embedding"),
    ],
)
def test_a_missing_tensor_is_named(name: str, tensor: str, copy: Copy) -> None:
    checkpoint = copy(name)
    edit_tensors(checkpoint, lambda tensors: tensors.pop(tensor))
    named = tensor.replace("language_model.model.", "language_model.")
    refused(checkpoint, "has no tensor", named)


@each
def test_a_missing_head_is_named(name: str, copy: Copy) -> None:
    checkpoint = copy(name)
    edit_tensors(checkpoint, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    refused(checkpoint, "has no tensor language_model.lm_head.weight", "tie_word_embeddings")


def test_what_is_behind_the_used_block_may_be_missing(copy: Copy) -> None:
    checkpoint = copy("llava-1.5")

    def change(tensors: Any) -> None:
        for stored in list(tensors):
            if "encoder.layers.3." in stored or "post_layernorm" in stored:
                del tensors[stored]

    edit_tensors(checkpoint, change)
    model = Model(checkpoint)
    assert len(model.tower.stages) == 1 + 3 + 1  # the last block is left out
    assert model.family.vision_sizes(model.settings, "fp32").n_layers == 3


def test_pixtral_is_no_llava(copy: Copy) -> None:
    """The two have the same model_type."""
    checkpoint = copy("llava-1.5")
    assert family_of(checkpoint).name == "llava-1.5"
    set_key(checkpoint / "config.json", "vision_config.model_type", "pixtral")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert not Description(GOLDEN / "llava-1.5" / "checkpoint").family.recognises(config)


def test_an_unsupported_checkpoint_is_one_line(run: Run, copy: Copy, tmp_path: Path) -> None:
    checkpoint = copy("llava-next")
    set_key(checkpoint / "config.json", "text_config.model_type", "gemma")
    failed = run("export", checkpoint, "--out", tmp_path / "out")
    assert_one_line(failed, 2, "text_config.model_type", "gemma")
