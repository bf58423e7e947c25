"""Pixtral checkpoints as they occur, and what is said of those that cannot be exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_vlm_export import export_checkpoint
from edge_vlm_export.families.opened import Model
from edge_vlm_export.families.pixtral.config import read_settings

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import InputError
from tests.conftest import Run, assert_one_line, load_golden
from tests.export_helpers import copy_checkpoint, edit_json, edit_tensors, refused, set_key

pytestmark = pytest.mark.engine  # it exports models

NAME = "pixtral"
MODEL = load_golden(NAME)
BADGE = MODEL.folder / "images/badge_17x15_rgba.png"
TEKKEN = (  # Mistral's own rule
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return copy_checkpoint(NAME, tmp_path / "checkpoint")


def saved_spelling(name: str) -> str:
    """As transformers 4.52 and later call a tensor."""
    if "lm_head" in name:
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def test_newer_names_of_tensors_are_read(checkpoint: Path) -> None:
    def respell(tensors: Any) -> None:
        for name in list(tensors):
            tensors[saved_spelling(name)] = tensors.pop(name)

    expected = Model(MODEL.checkpoint)
    edit_tensors(checkpoint, respell)
    found = Model(checkpoint)
    assert not found.tied
    assert found.tensors.tensors.keys() == expected.tensors.tensors.keys()
    for name in ("vision_tower.ln_pre.weight", "language_model.layers.1.mlp.up_proj.weight"):
        np.testing.assert_array_equal(found.tensors[name].read(), expected.tensors[name].read())


def test_other_spellings_of_settings(checkpoint: Path) -> None:
    """As transformers 5 writes them: rope_parameters, the image processor inside, a .jinja."""
    expected = read_settings(checkpoint)

    def newer(config: Any) -> None:
        config["image_token_id"] = config.pop("image_token_index")
        for part in (config["text_config"], config["vision_config"]):
            theta = part.pop("rope_theta")
            part["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}

    edit_json(checkpoint / "config.json", newer)
    path = checkpoint / "preprocessor_config.json"
    images = json.loads(path.read_text(encoding="utf-8"))
    images["image_processor_type"] = "PixtralImageProcessorFast"
    path.unlink()
    edit_json(
        checkpoint / "processor_config.json",
        lambda data: data.update(image_processor=images, spatial_merge_size=1),
    )
    template = json.loads((checkpoint / "chat_template.json").read_text(encoding="utf-8"))
    (checkpoint / "chat_template.json").unlink()
    path = checkpoint / "chat_template.jinja"
    path.write_text(template["chat_template"], encoding="utf-8")
    (checkpoint / "generation_config.json").unlink()  # 2 is the class's default
    found = read_settings(checkpoint)
    for part in ("image_processor", "text", "chat_template", "stop_ids"):
        assert getattr(found, part) == getattr(expected, part)
    assert found.config.vision_config.theta == 10000
    Model(checkpoint)


def test_absent_keys_have_the_class_s_defaults(checkpoint: Path) -> None:
    """The released file leaves out the tower's sizes; its hidden_act is not the default."""

    def less(config: Any) -> None:
        vision = {"model_type": "pixtral", "hidden_act": "silu"}
        config["vision_config"] = vision
        for key in ("num_attention_heads", "num_key_value_heads"):
            del config["text_config"][key]

    edit_json(checkpoint / "config.json", less)
    (checkpoint / "processor_config.json").unlink()
    path = checkpoint / "preprocessor_config.json"
    path.write_text('{"image_processor_type": "PixtralImageProcessor"}', encoding="utf-8")
    found = read_settings(checkpoint)
    vision, text = found.config.vision_config, found.text
    assert (vision.hidden_size, vision.intermediate_size) == (1024, 4096)
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (24, 16)
    assert (text.attention.n_heads, text.attention.n_kv_heads) == (32, 8)
    assert (found.image_processor.longest_edge, found.image_processor.max_patches) == (1024, 4096)
    assert found.image_processor == read_settings(MODEL.checkpoint).image_processor
    set_key(checkpoint / "config.json", "vision_config.hidden_act", None)
    assert read_settings(checkpoint).config.vision_config.hidden_act == "gelu"


def test_the_processor_s_patch_size_counts(checkpoint: Path) -> None:
    set_key(checkpoint / "preprocessor_config.json", "patch_size", 14)
    assert read_settings(checkpoint).image_processor.patch_size == 16
    set_key(checkpoint / "processor_config.json", "patch_size", {"height": 16, "width": 16})
    assert read_settings(checkpoint).image_processor.patch_size == 16


def test_a_window_bounds_a_prompt(checkpoint: Path) -> None:
    """``null`` is none, an absent key is the class's 4096."""
    assert read_settings(checkpoint).text.max_sequence_length == 1024000
    set_key(checkpoint / "config.json", "text_config.sliding_window", 8192)
    assert read_settings(checkpoint).text.max_sequence_length == 8192
    edit_json(
        checkpoint / "config.json", lambda config: config["text_config"].pop("sliding_window")
    )
    assert read_settings(checkpoint).text.max_sequence_length == 4096


def test_a_projector_without_biases(checkpoint: Path, tmp_path: Path) -> None:
    """Zeros give the same answer."""
    biases = [f"multi_modal_projector.linear_{n}.bias" for n in (1, 2)]

    def zero(tensors: Any) -> None:
        for name in biases:
            tensors[name] = np.zeros_like(tensors[name])

    edit_tensors(checkpoint, zero)
    first = export_checkpoint(checkpoint, tmp_path / "first", vision="fp32", decoder="f32")
    edit_tensors(checkpoint, lambda tensors: [tensors.pop(name) for name in biases])
    set_key(checkpoint / "config.json", "multimodal_projector_bias", False)
    second = export_checkpoint(checkpoint, tmp_path / "second", vision="fp32", decoder="f32")
    answers = []
    for folder in (first, second):
        with EdgeVLM.load(folder, settings=MachineSettings(threads=1, cache=None)) as vlm:
            answers.append(vlm.ask(BADGE, "What?", max_tokens=8).token_ids)
    assert answers[0] == answers[1]


def test_the_manifest_tells_the_template_s_tokens(tmp_path: Path) -> None:
    folder = export_checkpoint(MODEL.checkpoint, tmp_path / "out", vision="fp32", decoder="f32")
    manifest = Bundle.open(folder).manifest
    assert manifest.prompt.template_variables() == {"bos_token": "<s>", "eos_token": "</s>"}
    assert manifest.tokens.bos is None  # the template writes it
    assert manifest.tokens.unspoken == (10, 12, 13)


@pytest.mark.parametrize(
    ("file", "key", "value", "fragments"),
    [
        ("config", "model_type", "mistral3", ("model_type", "llava (pixtral)")),
        ("config", "vision_feature_layer", -2, ("vision_feature_layer is -2",)),
        ("config", "vision_feature_select_strategy", "default", ("select_strategy",)),
        ("config", "projector_hidden_act", "relu", ("projector_hidden_act",)),
        ("config", "image_token_index", 11, ("image_token_index is 11", "[IMG]", "10")),
        ("config", "image_token_index", 704, ("image_token_index is 704", "704 ids")),
        ("config", "multimodal_projector_bias", False, ("linear_1.bias",)),
        ("config", "text_config.model_type", "llama", ("text_config.model_type", "mistral")),
        ("config", "text_config.hidden_act", "gelu", ("text_config.hidden_act",)),
        ("config", "text_config.head_dim", 31, ("head_dim is 31", "even number")),
        ("config", "text_config.num_key_value_heads", 3, ("num_key_value_heads is 3",)),
        ("config", "text_config.rope_scaling", {"type": "yarn"}, ("rope_scaling",)),
        ("config", "text_config.rope_theta", None, ("rope_theta",)),
        ("config", "text_config.layer_types", ["sliding_attention"], ("layer_types",)),
        ("config", "text_config.attn_logit_softcapping", 50.0, ("attn_logit_softcapping",)),
        ("config", "vision_config.head_dim", 8, ("head_dim is 8", "16")),
        ("config", "vision_config.num_attention_heads", 3, ("num_attention_heads is 3",)),
        ("config", "vision_config.num_attention_heads", 32, ("multiple of four",)),
        ("config", "vision_config.hidden_act", "quick_gelu", ("vision_config.hidden_act",)),
        ("config", "vision_config.patch_size", 14, ("patch_size is 16", "config.json: 14")),
        ("config", "vision_config.image_size", 512, ("longest_edge is 1024", "64 patches", "32")),
        ("preprocessor_config", "image_processor_type", "CLIPImageProcessor", ("CLIPImage",)),
        ("preprocessor_config", "size", {"height": 512, "width": 512}, ("size",)),
        ("preprocessor_config", "size.longest_edge", 1600, ("longest_edge is 1600", "100")),
        ("preprocessor_config", "resample", 2, ("resample is 2", "must be 3")),
        ("preprocessor_config", "do_resize", False, ("do_resize is false",)),
        ("preprocessor_config", "rescale_factor", 0.5, ("rescale_factor is 0.5",)),
        ("processor_config", "patch_size", 14, ("patch_size is 14", "config.json: 16")),
        ("processor_config", "spatial_merge_size", 2, ("spatial_merge_size is 2",)),
        ("processor_config", "image_break_token", "<br>", ("no special token <br>",)),
        ("generation_config", "eos_token_id", 704, ("eos_token_id is 704",)),
        ("chat_template", "chat_template", "", ("chat template",)),
        ("tokenizer", "model.ignore_merges", False, ("ignore_merges is false", "pixtral")),
        (
            "tokenizer",
            "pre_tokenizer.pretokenizers.0.pattern.Regex",
            TEKKEN,
            ("rule of qwen2 or pixtral",),
        ),
        ("tokenizer_config", "bos_token", "<bos>", ("bos_token", "no special token")),
    ],
)
def test_what_is_not_supported_is_named(
    checkpoint: Path, file: str, key: str, value: Any, fragments: tuple[str, ...]
) -> None:
    set_key(checkpoint / f"{file}.json", key, value)
    refused(checkpoint, *fragments)


def test_a_template_needs_its_tokens(checkpoint: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(checkpoint / name, lambda data: data.pop("eos_token"))
    refused(checkpoint, "names a eos_token", "chat template")


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.patch_conv.weight",
        "vision_tower.ln_pre.weight",
        "vision_tower.transformer.layers.2.feed_forward.gate_proj.weight",
        "vision_tower.transformer.layers.0.ffn_norm.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.layers.1.self_attn.k_proj.weight",
        "language_model.lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(checkpoint: Path, name: str) -> None:
    set_key(checkpoint / "config.json", "tie_word_embeddings", False)
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
    refused(checkpoint, "has no tensor", name.replace("language_model.model.", "language_model."))


def test_mistral_s_own_layout_is_one_line(run: Run, tmp_path: Path) -> None:
    """params.json, consolidated.safetensors and tekken.json are another layout."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("params.json", "tekken.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "consolidated.safetensors").write_bytes(b"")
    failed = run("export", folder, "--out", tmp_path / "out")
    assert_one_line(failed, 2, "config.json", "missing")


def test_fixed_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pictures of pixtral have any size"):
        export_checkpoint(MODEL.checkpoint, tmp_path / "out", target="portable", static_shapes=True)
