"""Settings where versions of transformers and trainers put them, and keys that nobody knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_vlm_export import export_checkpoint
from edge_vlm_export.families.opened import Description, Model

from tests.conftest import GOLDEN
from tests.export_helpers import copy_checkpoint, edit_json, refused, set_key

ROOT = Path(__file__).parents[2]
JINA, LLAVA = "tiny-126-tied", "llava-onevision"
CONFIG, IMAGES, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
Change = Callable[[Any], None]


@pytest.fixture(params=[JINA, LLAVA])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of each family whose settings may be changed."""
    return copy_checkpoint(request.param, tmp_path / "checkpoint", link_weights=True)


@pytest.fixture
def jina(tmp_path: Path) -> Path:
    return copy_checkpoint(JINA, tmp_path / "checkpoint", link_weights=True)


def in_text(checkpoint: Path, change: Change) -> None:
    """Change the language model's settings."""
    edit_json(checkpoint / CONFIG, lambda data: change(data["text_config"]))


def same_as(checkpoint: Path, before: Any) -> bool:
    """Whether all that is read is as it was, but for the model's name and the places of files."""
    now = Description(checkpoint).settings
    parts = set(vars(before)) - {"config", "name", "preprocessor_path"}
    return all(getattr(now, part) == getattr(before, part) for part in parts)


def moved(text: Any) -> None:
    """As transformers 5 writes it."""
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    text.pop("partial_rotary_factor", None)


ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
EQUAL: dict[str, Change] = {
    "moved": moved,
    "the same beside": lambda text: text.update(rope_parameters=ROPE),
    "without a type": lambda text: text.update(rope_parameters={"rope_theta": 1000000}),
    "the older key of a type": lambda text: text.update(rope_scaling={"type": "default"}),
    "nothing is scaled": lambda text: text.update(rope_scaling={**ROPE, "factor": 1.0}),
    "all of a head": lambda text: text.update(rope_parameters={**ROPE, "partial_rotary_factor": 1}),
    "by type of layer": lambda text: text.update(rope_parameters={"full_attention": ROPE}),
    "alike by type of layer": lambda text: text.update(
        rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}
    ),
    "null": lambda text: text.update(rope_parameters=None, rope_scaling=None),
    "a length without scaling": lambda text: text.update(
        rope_parameters={**ROPE, "original_max_position_embeddings": 8192}
    ),
    "types of layers": lambda text: text.update(layer_types=["full_attention"] * 2),
}
OTHER: dict[str, tuple[Change, tuple[str, ...]]] = {
    "another theta beside": (
        lambda text: text.update(rope_parameters={**ROPE, "rope_theta": 5e5}),
        ("rope_parameters.rope_theta is 500000.0, which contradicts rope_theta: 1000000.0",),
    ),
    "yarn beside": (
        lambda text: text.update(rope_parameters={**ROPE, "rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters is", 'rope_type is "yarn"', 'must be "default"'),
    ),
    "yarn of version 4": (
        lambda text: text.update(rope_scaling={"type": "yarn", "factor": 4.0}),
        ("rope_scaling is", 'is "yarn"', 'must be "default"'),
    ),
    "two types": (
        lambda text: text.update(rope_scaling={"rope_type": "default", "type": "linear"}),
        ('type is "linear", which contradicts rope_type',),
    ),
    "dynamic": (
        lambda text: text.update(rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2}),
        ('"dynamic"',),
    ),
    "multimodal sections": (
        lambda text: text.update(rope_scaling={"type": "default", "mrope_section": [16, 24, 24]}),
        ("mrope_section is [16, 24, 24]", "may change what the model computes"),
    ),
    "half of a head": (
        lambda text: text.update(rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
        ("partial_rotary_factor is 0.5",),
    ),
    "half of a head beside": (
        lambda text: text.update(partial_rotary_factor=0.5),
        ("text_config.partial_rotary_factor is 0.5",),
    ),
    "a factor": (
        lambda text: text.update(rope_parameters={**ROPE, "factor": 8.0}),
        ("factor is 8.0",),
    ),
    "another theta by type of layer": (
        lambda text: text.update(
            rope_parameters={"full_attention": ROPE, "sliding_attention": {"rope_theta": 1e4}}
        ),
        ("rope_parameters.sliding_attention.rope_theta is 10000.0", "contradicts"),
    ),
    "no theta": (
        lambda text: text.update(rope_theta=None, rope_parameters={"rope_type": "default"}),
        ("text_config.rope_theta is null, and rope_parameters has none either",),
    ),
    "a list": (
        lambda text: text.update(rope_parameters=[ROPE]),
        ("text_config.rope_parameters",),
    ),
    "sliding layers": (
        lambda text: text.update(layer_types=["full_attention", "sliding_attention"]),
        ("text_config.layer_types", "sliding_attention"),
    ),
    "a sliding window": (
        lambda text: text.update(use_sliding_window=True),
        ("use_sliding_window is true",),
    ),
}


@pytest.mark.parametrize("layout", EQUAL)
def test_rotary_positions_in_every_place(layout: str, checkpoint: Path) -> None:
    before = Description(checkpoint).settings
    in_text(checkpoint, EQUAL[layout])
    assert same_as(checkpoint, before)
    assert Description(checkpoint).text.rope_theta == 1000000.0


@pytest.mark.parametrize("layout", OTHER)
def test_other_rotary_positions_are_refused(layout: str, checkpoint: Path) -> None:
    change, fragments = OTHER[layout]
    in_text(checkpoint, change)
    refused(checkpoint, CONFIG, *fragments)


def nested(checkpoint: Path) -> None:
    """Put the image processor's settings where transformers 5 has them."""
    path = checkpoint / IMAGES
    set_key(checkpoint / PROCESSOR, "image_processor", json.loads(path.read_text("utf-8")))
    path.unlink()


def test_the_image_processor_inside_the_processor_s_file(checkpoint: Path) -> None:
    before = Description(checkpoint).settings
    nested(checkpoint)
    assert same_as(checkpoint, before)
    shutil.copy(GOLDEN / checkpoint_name(checkpoint) / "checkpoint" / IMAGES, checkpoint)
    assert same_as(checkpoint, before)  # both say the same
    set_key(checkpoint / IMAGES, "image_processor_type", "LlavaOnevisionImageProcessorFast")
    assert same_as(checkpoint, before)


def checkpoint_name(checkpoint: Path) -> str:
    """Which of the reference checkpoints a copy is of."""
    config = json.loads((checkpoint / CONFIG).read_text("utf-8"))
    return JINA if config["model_type"] == "jvlm" else LLAVA


def test_two_image_processors_that_differ_are_refused(checkpoint: Path) -> None:
    nested(checkpoint)
    shutil.copy(GOLDEN / checkpoint_name(checkpoint) / "checkpoint" / IMAGES, checkpoint)
    change = ("max_crops", 4) if checkpoint_name(checkpoint) == JINA else ("image_mean", [0.1] * 3)
    set_key(checkpoint / IMAGES, *change)
    refused(checkpoint, IMAGES, "contradicts image_processor in processor_config.json")


def test_a_wrong_value_inside_is_named_with_its_place(checkpoint: Path) -> None:
    nested(checkpoint)
    set_key(checkpoint / PROCESSOR, "image_processor.do_resize", False)
    refused(checkpoint, PROCESSOR, "image_processor.do_resize is false")


def test_ids_of_picture_tokens_are_compared_inside_too(jina: Path) -> None:
    nested(jina)
    set_key(jina / PROCESSOR, "image_processor.start_token_id", 5)
    refused(jina, PROCESSOR, "start_token_id is 5, which contradicts the id of <im_start>")


def test_everything_as_version_5_writes_it_gives_the_same_numbers(
    tmp_path: Path, jina: Path
) -> None:
    in_text(jina, moved)
    nested(jina)
    edit_json(jina / CONFIG, lambda data: data.update(torch_dtype="float16", use_cache=True))
    before, now = Model(GOLDEN / JINA / "checkpoint"), Model(jina)
    assert now.tower.shapes() == before.tower.shapes()
    assert now.decoder.text == before.decoder.text
    assert now.family.prompt(now.settings, now.tokenizer) == before.family.prompt(
        before.settings, before.tokenizer
    )


@pytest.mark.engine
@pytest.mark.parametrize("name", [JINA, LLAVA])
def test_the_bundle_is_the_same(name: str, tmp_path: Path) -> None:
    files = []
    for layout in ("published", "newer"):
        checkpoint = copy_checkpoint(name, tmp_path / layout, link_weights=True)
        if layout == "newer":
            in_text(checkpoint, moved)
            nested(checkpoint)
            set_key(checkpoint / "tokenizer.json", "padding", {"strategy": "BatchLongest"})
        out = export_checkpoint(
            checkpoint, tmp_path / f"{layout}-bundle", vision="fp32", decoder="f32", name="a"
        )
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0].keys() == files[1].keys()
    assert all(files[0][name] == files[1][name] for name in ("vision.onnx", "decoder.gguf"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("padding", {"strategy": "BatchLongest", "direction": "Right", "pad_id": 0}),
        ("padding", {"strategy": {"Fixed": 512}, "pad_token": "<pad>"}),
        ("truncation", {"direction": "Right", "max_length": 8, "stride": 0}),
    ],
)
def test_a_trainer_s_batches_change_no_token(checkpoint: Path, key: str, value: Any) -> None:
    before = Model(checkpoint).tokenizer
    set_key(checkpoint / "tokenizer.json", key, value)
    now = Model(checkpoint).tokenizer
    assert (now.tokens, now.merges, now.special) == (before.tokens, before.merges, before.special)


LEFTOVERS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer.log")


def test_what_a_trainer_leaves_is_ignored(checkpoint: Path) -> None:
    before = Description(checkpoint).settings
    for name in LEFTOVERS:
        (checkpoint / name).write_bytes(b"x")
    (checkpoint / "trainer_state.json").write_text("{broken", encoding="utf-8")
    (checkpoint / "global_step120").mkdir()
    (checkpoint / "global_step120" / "zero_pp_rank_0.pt").write_bytes(b"x")
    (checkpoint / "runs").mkdir()
    assert same_as(checkpoint, before)
    assert Model(checkpoint).tokenizer.tokens


@pytest.mark.parametrize("told", [694, [694, 696], [696, 694, 696]])
@pytest.mark.parametrize("level", ["", "text_config."])
def test_stop_ids_without_a_generation_config(jina: Path, level: str, told: Any) -> None:
    (jina / "generation_config.json").unlink()
    edit_json(jina / CONFIG, lambda data: data.pop("eos_token_id"))
    set_key(jina / CONFIG, f"{level}eos_token_id", told)
    ids = told if isinstance(told, list) else [told]
    assert Description(jina).settings.stop_ids == tuple(dict.fromkeys(ids))


def test_the_order_of_stop_ids(jina: Path) -> None:
    set_key(jina / CONFIG, "eos_token_id", 700)
    set_key(jina / CONFIG, "text_config.eos_token_id", 701)
    assert Description(jina).settings.stop_ids == (694, 696)
    set_key(jina / "generation_config.json", "eos_token_id", None)
    assert Description(jina).settings.stop_ids == (700,)
    set_key(jina / CONFIG, "eos_token_id", None)
    assert Description(jina).settings.stop_ids == (701,)
    set_key(jina / CONFIG, "text_config.eos_token_id", None)
    refused(jina, CONFIG, "eos_token_id is missing, also from generation_config.json")


def test_a_stop_id_of_config_json_has_to_exist(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    set_key(checkpoint / CONFIG, "eos_token_id", [694, 4000])
    refused(checkpoint, CONFIG, "eos_token_id is [694, 4000], the ids of answers end at")


def put_template(folder: Path, name: str, text: Any) -> None:
    """Write a template into one of the files that may have it."""
    path = folder / name
    if path.suffix == ".jinja":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    else:
        data = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**data, "chat_template": text}), encoding="utf-8")


def test_the_order_of_templates(checkpoint: Path) -> None:
    for name in ("chat_template.jinja", "chat_template.json"):
        (checkpoint / name).unlink(missing_ok=True)
    order = ("tokenizer_config.json", PROCESSOR, "chat_template.json", "chat_template.jinja")
    for name in order:
        put_template(checkpoint, name, f"from {name}")
        assert Description(checkpoint).settings.chat_template == f"from {name}"
    put_template(checkpoint, "additional_chat_templates/rag.jinja", "for retrieval")
    assert Description(checkpoint).settings.chat_template == "from chat_template.jinja"


@pytest.mark.parametrize(
    "several",
    [
        [{"name": "rag", "template": "x"}, {"name": "default", "template": "this"}],
        {"rag": "x", "default": "this"},
    ],
)
@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
def test_the_default_of_several_templates(checkpoint: Path, name: str, several: Any) -> None:
    for file in ("chat_template.jinja", "chat_template.json"):
        (checkpoint / file).unlink(missing_ok=True)
    put_template(checkpoint, name, several)
    assert Description(checkpoint).settings.chat_template == "this"


def test_additional_templates_alone_are_named(checkpoint: Path) -> None:
    for name in ("chat_template.jinja", "chat_template.json"):
        (checkpoint / name).unlink(missing_ok=True)
    put_template(checkpoint, "additional_chat_templates/tool_use.jinja", "x")
    refused(checkpoint, "chat_template.jinja: is missing", "additional_chat_templates has tool_use")


UNKNOWN: list[tuple[str, str, Any]] = [
    (CONFIG, "final_logit_softcapping", 30.0),
    (CONFIG, "attn_logit_softcapping", 30.0),
    (CONFIG, "logit_scale", 0.0625),
    (CONFIG, "pruned_heads", {"0": [1]}),
    (CONFIG, "is_encoder_decoder", True),
    (CONFIG, "something_new", False),
    *(
        (CONFIG, f"text_config.{key}", value)
        for key, value in (
            ("attn_logit_softcapping", 30.0),
            ("query_pre_attn_scalar", 256),
            ("embedding_multiplier", 12.0),
            ("residual_multiplier", 0.22),
            ("attention_multiplier", 0.015625),
            ("logits_scaling", 8.0),
            ("mlp_bias", True),
            ("clip_qkv", 8.0),
            ("num_experts", 8),
            ("use_qk_norm", True),
            ("no_rope_layers", [1, 0]),
            ("attention_sink", True),
            ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        )
    ),
    (CONFIG, "vision_config.window_size", 112),
    (CONFIG, "vision_config.layer_scale_init_value", 0.1),
    (IMAGES, "do_image_splitting", True),
    (IMAGES, "gamma", 2.2),
    (PROCESSOR, "add_newline", True),
]


@pytest.mark.parametrize(("file", "key", "value"), UNKNOWN)
def test_a_key_that_is_not_known_is_refused(
    checkpoint: Path, file: str, key: str, value: Any
) -> None:
    set_key(checkpoint / file, key, value)
    refused(checkpoint, file, f"{key} is {json.dumps(value)}, ")


@pytest.mark.parametrize(
    "value",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors"},
    ],
)
def test_quantized_weights_say_what_to_do(checkpoint: Path, value: Any) -> None:
    set_key(checkpoint / CONFIG, "quantization_config", value)
    refused(checkpoint, value["quant_method"], "quantized weights are not read", "made from")


def test_biases_that_the_code_always_has(tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(LLAVA, tmp_path / "checkpoint", link_weights=True)
    before = Description(checkpoint).settings
    set_key(checkpoint / CONFIG, "text_config.attention_bias", True)
    assert same_as(checkpoint, before)
    set_key(checkpoint / CONFIG, "text_config.attention_bias", False)
    refused(checkpoint, "text_config.attention_bias is false")


def test_two_spellings_of_one_key_have_to_agree(tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(LLAVA, tmp_path / "checkpoint", link_weights=True)
    set_key(checkpoint / CONFIG, "image_token_id", 603)
    assert Description(checkpoint).settings.text.vocab_size == 603
    set_key(checkpoint / CONFIG, "image_token_id", 604)
    refused(checkpoint, "image_token_id is 604, which contradicts image_token_index")


def test_sizes_that_are_repeated_have_to_agree(checkpoint: Path) -> None:
    """Trainers write the language model's beside it, other programs under other names."""
    before = Description(checkpoint).settings
    for key, value in (("hidden_size", 128), ("vocab_size", 704)):
        set_key(checkpoint / CONFIG, key, value)
        assert same_as(checkpoint, before)
    text = before.text
    for key, value in (
        ("num_attention_heads", text.attention.n_heads),
        ("num_key_value_heads", text.attention.n_kv_heads),
        ("head_dim", text.attention.head_dim),
        ("intermediate_size", text.ffn_size),
    ):
        set_key(checkpoint / CONFIG, f"text_config.{key}", value)
        assert same_as(checkpoint, before)
    set_key(checkpoint / CONFIG, "vocab_size", 1000)
    refused(checkpoint, CONFIG, "vocab_size is 1000, which contradicts text_config.vocab_size: 704")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 8),
        ("num_key_value_heads", 2),
        ("head_dim", 64),
        ("intermediate_size", 1),
    ],
)
def test_sizes_under_other_names_have_to_agree(jina: Path, key: str, value: int) -> None:
    set_key(jina / CONFIG, f"text_config.{key}", value)
    refused(jina, CONFIG, f"text_config.{key} is {value}, which contradicts block_config")


# What transformers 4 writes of a configuration that was never thinned out, and 5 in its place.
GENERIC: dict[str, Any] = {
    "_name_or_path": "owner/model",
    "_attn_implementation_autoset": True,
    "_commit_hash": None,
    "add_cross_attention": False,
    "architectures": ["A"],
    "attention_dropout": 0.1,
    "attn_implementation": "sdpa",
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": 1,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "dtype": "bfloat16",
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_range": 0.02,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": 0,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": "T",
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": "bfloat16",
    "torchscript": False,
    "transformers_version": "5.0.0",
    "typical_p": 1.0,
    "tie_word_embeddings": True,
    "tokenizer_padding_side": "right",
    "unsloth_fixed": True,
    "unsloth_version": "2025.11.1",
    "use_bfloat16": False,
    "use_cache": False,
}


@pytest.mark.parametrize("level", [None, "text_config", "vision_config"])
def test_keys_of_every_configuration_change_nothing(checkpoint: Path, level: str | None) -> None:
    before = Description(checkpoint).settings

    def add(data: Any) -> None:
        part = data[level] if level else data
        for key, value in GENERIC.items():
            part.setdefault(key, value)

    edit_json(checkpoint / CONFIG, add)
    assert same_as(checkpoint, before)


@pytest.mark.parametrize(
    "folder",
    [
        GOLDEN / "tiny-126-tied" / "checkpoint",
        GOLDEN / "tiny-378" / "checkpoint",
        GOLDEN / "llava-onevision" / "checkpoint",
        ROOT / "models" / "demo" / "checkpoint",
        ROOT / "export" / "edge_vlm_export" / "configs" / "jina-vlm",
    ],
)
def test_published_settings_are_known(folder: Path) -> None:
    assert Description(folder).settings.stop_ids


def test_what_an_image_processor_always_writes(checkpoint: Path) -> None:
    before = Description(checkpoint).settings
    more = {
        "_valid_processor_keys": ["images", "do_resize"],
        "data_format": "channels_first",
        "default_to_square": False,
        "device": None,
        "disable_grouping": None,
        "input_data_format": None,
        "pad_size": None,
        "return_tensors": None,
    }
    edit_json(checkpoint / IMAGES, lambda data: data.update(more))
    edit_json(
        checkpoint / PROCESSOR, lambda data: data.update(video_processor={}, chat_template=None)
    )
    assert same_as(checkpoint, before)
