"""Qwen2.5-VL checkpoints as they occur, and what is said of those that cannot be exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from edge_vlm_export import export_checkpoint
from edge_vlm_export.families.opened import Description, Model
from edge_vlm_export.families.qwen2_5_vl.config import read_settings
from edge_vlm_export.synthetic.checkpoint import config_folder, synthesize

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import CheckpointError, InputError
from edge_vlm.families.base import find_family
from tests.conftest import Run, assert_one_line, load_golden
from tests.export_helpers import copy_checkpoint, edit_json, edit_tensors, refused, set_key

pytestmark = pytest.mark.engine  # it exports models

NAME = "qwen2.5-vl"
MODEL = load_golden(NAME)
TEXT_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "use_sliding_window", "sliding_window", "max_window_layers", "use_cache"),
    *("attention_dropout", "initializer_range", "bos_token_id", "eos_token_id"),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return copy_checkpoint(NAME, tmp_path / "checkpoint")


def saved_spelling(name: str) -> str:
    """As transformers 4.52 and later call a tensor."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name if "lm_head" in name else name.replace("model.", "model.language_model.", 1)


def test_newer_names_of_tensors_are_read(checkpoint: Path) -> None:
    def respell(tensors: Any) -> None:
        for name in list(tensors):
            tensors[saved_spelling(name)] = tensors.pop(name)

    expected = Model(MODEL.checkpoint)
    edit_tensors(checkpoint, respell)
    found = Model(checkpoint)
    assert found.tied
    assert found.tensors.tensors.keys() == expected.tensors.tensors.keys()
    for name in ("visual.blocks.1.attn.qkv.weight", "model.layers.1.mlp.up_proj.weight"):
        np.testing.assert_array_equal(found.tensors[name].read(), expected.tensors[name].read())


def test_other_spellings_of_settings(checkpoint: Path) -> None:
    """As transformers 5 writes them: a text_config, rope_parameters, size, a .jinja."""
    expected = read_settings(checkpoint)

    def newer(config: Any) -> None:
        text = {key: config.pop(key) for key in TEXT_KEYS}
        rope = config.pop("rope_scaling")
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": config.pop("rope_theta"),
            "mrope_section": rope["mrope_section"],
        }
        text |= {"model_type": "qwen2_5_vl_text", "layer_types": ["full_attention"] * 3}
        config["text_config"] = text
        vision = config["vision_config"]
        vision["in_channels"] = vision.pop("in_chans")

    edit_json(checkpoint / "config.json", newer)
    images = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
    edges = images.pop("min_pixels"), images.pop("max_pixels")
    images["size"] = dict(zip(("shortest_edge", "longest_edge"), edges, strict=True))
    images["image_processor_type"] = "Qwen2VLImageProcessorFast"
    (checkpoint / "preprocessor_config.json").unlink()
    path = checkpoint / "processor_config.json"
    path.write_text(json.dumps({"image_processor": images}), encoding="utf-8")
    template = json.loads((checkpoint / "chat_template.json").read_text(encoding="utf-8"))
    (checkpoint / "chat_template.json").unlink()
    path = checkpoint / "chat_template.jinja"
    path.write_text(template["chat_template"], encoding="utf-8")
    (checkpoint / "generation_config.json").unlink()  # config.json tells the first
    found = read_settings(checkpoint)
    for part in ("image_processor", "text", "chat_template", "sections"):
        assert getattr(found, part) == getattr(expected, part)
    assert found.stop_ids == expected.stop_ids[:1]
    Model(checkpoint)


def test_a_text_config_beside_the_same_keys(checkpoint: Path) -> None:
    """As some versions of transformers write it; both have to say the same."""
    expected = read_settings(checkpoint)

    def both(config: Any) -> None:
        text = {key: config[key] for key in (*TEXT_KEYS, "rope_theta", "rope_scaling")}
        config["text_config"] = text | {"model_type": "qwen2_5_vl_text"}

    edit_json(checkpoint / "config.json", both)
    assert read_settings(checkpoint).text == expected.text
    set_key(checkpoint / "config.json", "hidden_size", 64)
    refused(checkpoint, "hidden_size is 64, which contradicts text_config.hidden_size: 128")


def test_rope_scaling_in_its_three_forms(checkpoint: Path) -> None:
    sections = [4, 6, 6]
    for told in (
        {"type": "default", "rope_type": "default", "mrope_section": sections},
        {"rope_type": "mrope", "mrope_section": sections},
    ):
        set_key(checkpoint / "config.json", "rope_scaling", told)
        assert list(read_settings(checkpoint).sections) == sections


def test_absent_keys_have_the_class_s_defaults(checkpoint: Path) -> None:
    def less(config: Any) -> None:
        for key in ("patch_size", "spatial_merge_size", "window_size", "temporal_patch_size"):
            del config["vision_config"][key]

    expected = read_settings(checkpoint).image_processor
    edit_json(checkpoint / "config.json", less)
    for key in ("min_pixels", "max_pixels", "patch_size", "image_mean", "image_std"):
        edit_json(checkpoint / "preprocessor_config.json", lambda data, key=key: data.pop(key))
    found = read_settings(checkpoint).image_processor
    assert found == expected.model_copy(update={"max_pixels": 28 * 28 * 1280})


def test_a_head_of_its_own_is_used(checkpoint: Path, tmp_path: Path) -> None:
    head = np.random.default_rng(0).standard_normal((581, 128)).astype(np.float32)
    edit_tensors(checkpoint, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(CheckpointError, match=r"has a tensor lm_head\.weight, but tie_word_emb"):
        Model(checkpoint)
    set_key(checkpoint / "config.json", "tie_word_embeddings", False)
    folder = export_checkpoint(checkpoint, tmp_path / "out", vision="fp32", decoder="f32")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "decoder.gguf").tensors}
    np.testing.assert_array_equal(tensors["output.weight"].data, head)
    assert not Bundle.open(folder).manifest.decoder.tied_head
    edit_tensors(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    refused(checkpoint, "has no tensor lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize(
    ("file", "key", "value", "fragments"),
    [
        ("config", "model_type", "qwen2_vl", ("model_type", "qwen2_5_vl (qwen2.5-vl)")),
        ("config", "hidden_act", "gelu", ("hidden_act", '"silu"')),
        ("config", "use_sliding_window", True, ("use_sliding_window",)),
        ("config", "rope_scaling", {"type": "yarn"}, ("rope_scaling", 'type is "yarn"')),
        ("config", "rope_scaling", None, ("mrope_section", "16 frequencies")),
        ("config", "rope_scaling.mrope_section", [4, 6, 7], ("mrope_section", "16 frequencies")),
        ("config", "rope_scaling.mrope_section", [4, 12], ("mrope_section",)),
        ("config", "rope_theta", None, ("rope_theta",)),
        ("config", "layer_types", ["sliding_attention"], ("layer_types",)),
        ("config", "num_attention_heads", 3, ("heads is 3, which does not divide",)),
        ("config", "hidden_size", None, ("hidden_size is missing",)),
        ("config", "image_token_id", 553, ("image_token_id is 553", "552")),
        ("config", "image_token_id", 581, ("image_token_id is 581", "581 ids")),
        ("config", "mystery", 1, ("mystery is 1, a key that is not known",)),
        ("config", "vision_config.mystery", 1, ("vision_config.mystery is 1, a key",)),
        ("config", "vision_config", None, ("vision_config is missing",)),
        ("config", "vision_config.hidden_act", "quick_gelu", ("vision_config.hidden_act",)),
        ("config", "vision_config.depth", 3, ("fullatt_block_indexes is 3", "3 blocks")),
        ("config", "vision_config.out_hidden_size", 64, ("out_hidden_size is 64", "128")),
        ("config", "vision_config.window_size", 100, ("window_size is 100", "whole blocks")),
        ("config", "vision_config.num_heads", 3, ("num_heads is 3",)),
        ("config", "vision_config.num_heads", 8, ("num_heads is 8", "multiple of four")),
        ("config", "vision_config.in_chans", 1, ("in_chans", "3")),
        ("config", "vision_config.patch_size", 7, ("patch_size is 14", "config.json: 7")),
        ("config", "text_config", {"hidden_size": 5}, ("text_config.model_type is missing",)),
        ("preprocessor_config", "resample", 2, ("resample is 2", "must be 3")),
        ("preprocessor_config", "do_normalize", False, ("do_normalize is false",)),
        ("preprocessor_config", "rescale_factor", 0.5, ("rescale_factor is 0.5",)),
        ("preprocessor_config", "image_std", [0.5, 0.5], ("image_std",)),
        ("preprocessor_config", "image_processor_type", "CLIPImageProcessor", ("CLIPImage",)),
        ("preprocessor_config", "merge_size", 4, ("merge_size is 4", "vision_config")),
        ("preprocessor_config", "max_pixels", 1000, ("min_pixels",)),
        ("generation_config", "eos_token_id", 562, ("eos_token_id is 562", "562")),
        ("chat_template", "chat_template", "", ("chat template",)),
        ("tokenizer", "pre_tokenizer.pretokenizers.0.pattern.Regex", ".", ("rule of qwen2",)),
        ("tokenizer", "model.vocab", [], ("model.vocab",)),
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
        "visual.patch_embed.proj.weight",
        "visual.blocks.2.mlp.gate_proj.bias",
        "visual.merger.ln_q.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.norm.weight",
    ],
)
def test_a_missing_tensor_is_named(checkpoint: Path, name: str) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
    refused(checkpoint, "has no tensor", name)


def test_a_tensor_of_another_shape_is_named(checkpoint: Path) -> None:
    """As in a checkpoint whose patches have one frame."""
    name = "visual.patch_embed.proj.weight"

    def change(tensors: Any) -> None:
        tensors[name] = np.ascontiguousarray(tensors[name][:, :, :1])

    edit_tensors(checkpoint, change)
    refused(checkpoint, name, "shape")


def test_an_unsupported_checkpoint_is_one_line(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    set_key(checkpoint / "config.json", "rope_scaling", {"type": "yarn"})
    failed = run("export", checkpoint, "--out", tmp_path / "out")
    assert_one_line(failed, 2, "rope_scaling", "yarn")
    set_key(
        checkpoint / "config.json", "rope_scaling", {"type": "mrope", "mrope_section": [4, 6, 6]}
    )
    fixed = ("--target", "portable", "--static-shapes")
    failed = run("export", checkpoint, "--out", tmp_path / "out", *fixed)
    assert_one_line(failed, 2, "static-shapes", "any size")


def test_fixed_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pictures of qwen2\.5-vl have any size"):
        export_checkpoint(MODEL.checkpoint, tmp_path / "out", target="portable", static_shapes=True)


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_released_sizes_come_with_the_exporter(size: str) -> None:
    name = f"qwen2.5-vl-{size}"
    model = Description(config_folder(name))
    released = find_family(NAME).released()[name]
    assert model.settings.image_processor == released.processor
    sizes, text = released.decoder, model.text
    assert (text.n_layers, text.hidden_size, text.ffn_size, text.n_ids) == (
        *(sizes.n_layers, sizes.hidden_size, sizes.ffn_size),
        sizes.vocab_size + sizes.additional_vocab_size,
    )
    assert text.attention.n_kv_heads == sizes.n_kv_heads
    assert any(model.settings.tie_word_embeddings) is sizes.tied_head
    seen = model.family.vision_sizes(model.settings, released.vision.precision)
    assert seen == released.vision
    special = model.family.made_up_tokens(model.settings)
    assert (special["<|endoftext|>"], special["<|im_end|>"]) == (151643, 151645)
    assert special["<|image_pad|>"] == model.settings.config.image_token_id


def test_a_random_checkpoint_of_a_flat_config(tmp_path: Path) -> None:
    """As ``synthesize --config qwen2.5-vl-3b``, with the sizes of the golden model."""
    source = tmp_path / "settings"
    source.mkdir()
    for name in ("config.json", "preprocessor_config.json", "chat_template.json"):
        (source / name).write_bytes((MODEL.checkpoint / name).read_bytes())
    (source / "generation_config.json").write_text('{"eos_token_id": [542, 540]}')
    out = synthesize(source, tmp_path / "random", layers=2)
    model = Model(out)
    assert (model.text.n_layers, model.text.vocab_size) == (2, 554)
    assert model.tensors["visual.blocks.0.norm1.weight"].read().mean() == pytest.approx(1, abs=0.1)
    assert abs(model.tensors["visual.blocks.0.attn.qkv.bias"].read()).max() < 0.2
    folder = export_checkpoint(out, tmp_path / "bundle", vision="int8", decoder="q8_0")
    report = Bundle.open(folder).manifest.report
    assert report is not None
    assert report.vision is not None
    assert not report.failures
