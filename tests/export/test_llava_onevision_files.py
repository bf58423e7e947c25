"""LLaVA-OneVision checkpoints as they occur, and what is said of those that cannot be exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from edge_vlm_export import export_checkpoint
from edge_vlm_export.families.llava_onevision.config import read_settings
from edge_vlm_export.families.opened import Model

from edge_vlm.bundle.manifest import Bundle
from tests.conftest import Run, assert_one_line, load_golden
from tests.export_helpers import copy_checkpoint, edit_json, edit_tensors, refused, set_key

pytestmark = pytest.mark.engine  # it exports models

NAME = "llava-onevision"
MODEL = load_golden(NAME)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return copy_checkpoint(NAME, tmp_path / "checkpoint")


def in_memory_spelling(name: str) -> str:
    """As transformers 4.52 and later call a tensor that is loaded."""
    return "model." + name.replace("language_model.model.", "language_model.")


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
    assert found.tied
    assert found.tensors.tensors.keys() == expected.tensors.tensors.keys()
    name = "language_model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(found.tensors[name].read(), expected.tensors[name].read())


def test_other_spellings_of_settings(checkpoint: Path) -> None:
    """As transformers 5 writes them: one file for both processors, rope_parameters, a .jinja."""
    expected = read_settings(checkpoint)

    def newer(config: Any) -> None:
        config["image_token_id"] = config.pop("image_token_index")
        config["video_token_id"] = config.pop("video_token_index")
        text = config["text_config"]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
        text["layer_types"] = ["full_attention"] * 2
        text["rope_scaling"] = text["head_dim"] = None

    edit_json(checkpoint / "config.json", newer)
    images = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
    (checkpoint / "preprocessor_config.json").unlink()
    set_key(checkpoint / "processor_config.json", "image_processor", images)
    template = json.loads((checkpoint / "chat_template.json").read_text(encoding="utf-8"))
    (checkpoint / "chat_template.json").unlink()
    path = checkpoint / "chat_template.jinja"
    path.write_text(template["chat_template"], encoding="utf-8")
    (checkpoint / "generation_config.json").unlink()  # config.json tells the same
    found = read_settings(checkpoint)
    for part in ("image_processor", "text", "stop_ids", "chat_template", "image_token"):
        assert getattr(found, part) == getattr(expected, part)


def test_absent_keys_have_the_class_s_defaults(checkpoint: Path) -> None:
    def less(config: Any) -> None:
        del config["vision_aspect_ratio"], config["vision_feature_layer"]

    expected = read_settings(checkpoint)
    edit_json(checkpoint / "config.json", less)
    (checkpoint / "processor_config.json").unlink()
    for key in ("image_grid_pinpoints", "size", "resample"):
        edit_json(checkpoint / "preprocessor_config.json", lambda data, key=key: data.pop(key))
    assert read_settings(checkpoint).image_processor == expected.image_processor
    assert expected.text.norm_eps == 1e-6
    assert expected.text.max_sequence_length == 32768
    edit_json(checkpoint / "preprocessor_config.json", lambda data: data.pop("image_mean"))
    assert read_settings(checkpoint).image_processor.image_mean[0] == 0.48145466


def test_a_head_of_its_own_is_used(checkpoint: Path, tmp_path: Path) -> None:
    head = np.random.default_rng(0).standard_normal((704, 128)).astype(np.float32)
    edit_tensors(
        checkpoint, lambda tensors: tensors.update({"language_model.lm_head.weight": head})
    )
    folder = export_checkpoint(checkpoint, tmp_path / "out", vision="fp32", decoder="f32")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "decoder.gguf").tensors}
    np.testing.assert_array_equal(tensors["output.weight"].data, head)
    assert not Bundle.open(folder).manifest.decoder.tied_head
    edit_tensors(checkpoint, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    set_key(checkpoint / "config.json", "text_config.tie_word_embeddings", False)
    refused(checkpoint, "has no tensor language_model.lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize(
    ("file", "key", "value", "fragments"),
    [
        ("config", "model_type", "blip", ("model_type", "llava_onevision")),
        ("config", "vision_feature_select_strategy", "default", ('must be "full"',)),
        ("config", "vision_feature_layer", -9, ("vision_feature_layer is -9", "has 3")),
        ("config", "vision_feature_layer", [-1, -2], ("vision_feature_layer",)),
        ("config", "vision_aspect_ratio", "anyres", ("vision_aspect_ratio", '"anyres"')),
        ("config", "projector_hidden_act", "relu", ("projector_hidden_act", '"gelu"')),
        ("config", "multimodal_projector_bias", False, ("multimodal_projector_bias",)),
        ("config", "use_image_newline_parameter", False, ("use_image_newline_parameter",)),
        ("config", "image_token_index", 604, ("image_token_index is 604", "603")),
        ("config", "text_config.model_type", "llama", ("text_config.model_type", '"qwen2"')),
        ("config", "text_config.hidden_act", "gelu", ("text_config.hidden_act", '"silu"')),
        ("config", "text_config.use_sliding_window", True, ("use_sliding_window",)),
        ("config", "text_config.rope_scaling", {"type": "yarn"}, ("rope_scaling", '"default"')),
        ("config", "text_config.rope_theta", None, ("rope_theta",)),
        ("config", "text_config.layer_types", ["sliding_attention"], ("text_config.layer_types",)),
        (
            "config",
            "text_config.num_attention_heads",
            3,
            ("heads is 3, which does not divide",),
        ),
        ("config", "text_config.hidden_size", None, ("text_config.hidden_size is missing",)),
        ("config", "text_config.intermediate_size", 257, ("mlp", "257")),
        ("config", "vision_config.model_type", "clip_vision_model", ("siglip_vision_model",)),
        ("config", "vision_config.hidden_act", "quick_gelu", ("vision_config.hidden_act",)),
        ("config", "vision_config.image_size", 378, ("size is 384x384", "378")),
        ("config", "vision_config.num_hidden_layers", 2, ("encoder.layers.2", "not part of")),
        ("config", "image_grid_pinpoints", [[384, 384]], ("image_grid_pinpoints", "contradicts")),
        ("preprocessor_config", "resample", 2, ("resample is 2", "must be 3")),
        ("preprocessor_config", "do_pad", False, ("do_pad is false",)),
        ("preprocessor_config", "rescale_factor", 0.5, ("rescale_factor is 0.5",)),
        ("preprocessor_config", "image_std", [0.5, 0.5], ("image_std",)),
        ("preprocessor_config", "image_std", [0.5, 0.5, 0.0], ("image_std",)),
        ("preprocessor_config", "image_processor_type", "CLIPImageProcessor", ("CLIPImage",)),
        ("processor_config", "num_image_tokens", 576, ("num_image_tokens is 576", "729")),
        ("processor_config", "vision_aspect_ratio", "anyres_max_4", ("anyres_max_9",)),
        ("processor_config", "image_token", "<picture>", ("no special token <picture>",)),
        ("generation_config", "eos_token_id", 603, ("eos_token_id is 603",)),
        ("chat_template", "chat_template", "", ("chat template",)),
        ("tokenizer", "pre_tokenizer.pretokenizers.0.pattern.Regex", ".", ("rule of qwen2",)),
    ],
)
def test_what_is_not_supported_is_named(
    checkpoint: Path, file: str, key: str, value: Any, fragments: tuple[str, ...]
) -> None:
    set_key(checkpoint / f"{file}.json", key, value)
    refused(checkpoint, *fragments)


@pytest.mark.parametrize(
    "name",
    [
        "image_newline",
        "multi_modal_projector.linear_1.bias",
        "language_model.model.layers.1.self_attn.k_proj.bias",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc2.weight",
    ],
)
def test_a_missing_tensor_is_named(checkpoint: Path, name: str) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
    refused(checkpoint, "has no tensor", name.replace("language_model.model.", "language_model."))


def test_tensors_that_nothing_reads_may_be_missing(checkpoint: Path) -> None:
    def change(tensors: Any) -> None:
        for part in ("weight", "bias"):
            del tensors[f"vision_tower.vision_model.post_layernorm.{part}"]

    edit_tensors(checkpoint, change)
    set_key(checkpoint / "config.json", "vision_feature_layer", -2)
    model = Model(checkpoint)
    assert len(model.tower.stages) == 1 + 2 + 1  # the last block is left out
    assert model.family.vision_sizes(model.settings, "fp32").n_layers == 2


def test_an_unsupported_checkpoint_is_one_line(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    set_key(checkpoint / "config.json", "text_config.model_type", "gemma")
    failed = run("export", checkpoint, "--out", tmp_path / "out")
    assert_one_line(failed, 2, "text_config.model_type", "gemma")
