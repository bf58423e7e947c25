"""Reading tensors, and every way in which a checkpoint's files can be wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from edge_vlm_export.checkpoint.tensors import MAX_HEADER_BYTES, MAX_TENSORS, Checkpoint
from edge_vlm_export.families.opened import Model
from safetensors.numpy import load_file, save_file

from edge_vlm.errors import CheckpointError
from tests.conftest import GOLDEN, GOLDEN_NAMES
from tests.export_helpers import Arrays, copy_checkpoint, edit_json, edit_tensors, refused, set_key

TEXT = "model.language_model."
VISION = "model.vision_model."
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A copy of the checkpoint with one float32 weights file."""
    return copy_checkpoint("tiny-378", tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A copy of the checkpoint with two bfloat16 weights files and an index."""
    return copy_checkpoint("tiny-126-tied", tmp_path / "checkpoint")


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_tensors_equal_those_of_the_safetensors_library(name: str) -> None:
    folder = GOLDEN / name / "checkpoint"
    expected: Arrays = {}
    for path in folder.glob("*.safetensors"):
        expected |= load_file(path)
    opened = Checkpoint.open(folder)
    assert opened.tensors.keys() == expected.keys()
    for key, tensor in opened.tensors.items():
        values = tensor.read()
        assert values.dtype == np.float32
        assert tensor.shape == expected[key].shape
        assert np.array_equal(values, expected[key].astype(np.float32)), key


def test_half_precision_tensors_are_read(tmp_path: Path) -> None:
    values = np.linspace(-3, 3, 35, dtype=np.float32).reshape(5, 7)
    stored = {"half": values.astype(np.float16), "bf16": values.astype(ml_dtypes.bfloat16)}
    save_file(stored, tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    for name, array in stored.items():
        assert np.array_equal(opened[name].read(), array.astype(np.float32))


def test_a_tensor_is_read_in_pieces_of_bounded_size() -> None:
    tensor = Checkpoint.open(GOLDEN / "tiny-378" / "checkpoint")[f"{VISION}pos_embed"]
    pieces = list(tensor.blocks(n_values=1000))
    assert max(piece.size for piece in pieces) <= 1000
    assert [len(piece) for piece in pieces] == [15] * 48 + [9]
    assert np.array_equal(np.concatenate(pieces), tensor.read())


@pytest.mark.parametrize(("name", "tied"), [("tiny-378", False), ("tiny-126-tied", True)])
def test_the_files_decide_whether_the_head_is_tied(name: str, tied: bool) -> None:
    folder = GOLDEN / name / "checkpoint"
    assert Model(folder).tied is tied


def test_one_config_level_may_contradict_the_files(single: Path) -> None:
    set_key(single / "config.json", "tie_word_embeddings", True)
    assert Model(single).tied is False


def test_both_config_levels_may_not(single: Path) -> None:
    set_key(single / "config.json", "tie_word_embeddings", True)
    set_key(single / "config.json", "text_config.tie_word_embeddings", True)
    refused(single, "model.safetensors", "has a tensor lm_head.weight", "tie_word_embeddings")


def test_a_missing_head_contradicts_an_untied_config(single: Path) -> None:
    edit_tensors(single, lambda tensors: tensors.pop("lm_head.weight"))
    refused(single, "has no tensor lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize(
    "name",
    [
        f"{TEXT}embedding.new_embedding",
        f"{TEXT}layers.1.ffn.up.weight",
        f"{TEXT}layers.2.attn.q_lnorm.weight",
        f"{VISION}patch_embed.proj.bias",
        f"{VISION}layers.4.attn.k_b",
        f"{VISION}vl_connector.pad_embed",
        f"{VISION}vl_connector.projector.down.weight",
    ],
)
def test_a_missing_tensor_is_named(single: Path, name: str) -> None:
    shape = load_file(single / "model.safetensors")[name].shape
    edit_tensors(single, lambda tensors: tensors.pop(name))
    refused(single, "model.safetensors", name, str(list(shape)))


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", f"{TEXT}layers.0.attn.qkv_w.weight", f"{VISION}pos_embed"],
)
def test_a_wrong_shape_is_named_with_both_shapes(single: Path, name: str) -> None:
    rows, columns = load_file(single / "model.safetensors")[name].shape

    def cut(tensors: Arrays) -> None:
        tensors[name] = tensors[name][:-1].copy()

    edit_tensors(single, cut)
    refused(single, "model.safetensors", name, str([rows, columns]), str([rows - 1, columns]))


def test_dead_tensors_may_be_absent(single: Path) -> None:
    set_key(single / "config.json", "vision_config.vit_layers", [-3, -4])
    dead = [f"{VISION}post_lnorm.weight", f"{VISION}post_lnorm.bias"]

    def drop(tensors: Arrays) -> None:
        for name in [*dead, *(key for key in tensors if f"{VISION}layers.5." in key)]:
            del tensors[name]

    edit_tensors(single, drop)
    assert Model(single).tied is False


def test_dead_tensors_still_have_the_right_shape(single: Path) -> None:
    set_key(single / "config.json", "vision_config.vit_layers", [-3, -4])
    name = f"{VISION}layers.5.ffn.up.bias"
    edit_tensors(single, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    refused(single, name, "[3]", "[160]")


def test_an_unknown_tensor_is_refused(single: Path) -> None:
    name = f"{TEXT}layers.0.attn.sinks"
    edit_tensors(single, lambda tensors: tensors.update({name: np.zeros(4, np.float32)}))
    refused(single, name, "not part of the model")


@pytest.mark.parametrize("part", ["q_b", "k_b", "v_b"])
def test_a_bias_in_the_language_model_is_refused(single: Path, part: str) -> None:
    name = f"{TEXT}layers.1.attn.{part}"

    def set_bias(tensors: Arrays) -> None:
        tensors[name][-1] = 1e-6

    edit_tensors(single, set_bias)
    refused(single, name, "not zero")


def test_biases_of_the_language_model_may_be_absent(single: Path) -> None:
    def drop(tensors: Arrays) -> None:
        for name in [key for key in tensors if key.startswith(TEXT) and key[-2:] == "_b"]:
            del tensors[name]

    edit_tensors(single, drop)
    assert Model(single).tied is False


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", [f"{TEXT}layers.1.attn.out.weight", f"{VISION}pos_embed"])
def test_values_that_are_no_numbers_are_refused(single: Path, name: str, value: float) -> None:
    def spoil(tensors: Arrays) -> None:
        tensors[name][3, 5] = value

    edit_tensors(single, spoil)
    refused(single, name, "infinite or not a number")


def test_a_value_beyond_half_precision_is_refused(single: Path) -> None:
    name = f"{TEXT}layers.1.attn.out.weight"

    def spoil(tensors: Arrays) -> None:
        tensors[name][3, 5] = 70000

    edit_tensors(single, spoil)
    refused(single, "blk.1.attn_output.weight", "half precision")


def test_a_cut_off_weights_file_is_refused(single: Path) -> None:
    path = single / "model.safetensors"
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    for size in (0, 7, 8, 100, length - 1, length, length + 4, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="is cut off"):
            Checkpoint.open(single)
    refused(single, "model.safetensors", "is cut off")


def test_a_cut_off_shard_is_refused(sharded: Path) -> None:
    path = sharded / SHARD
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, SHARD, "is cut off")


def test_bytes_behind_the_tensors_are_refused(single: Path) -> None:
    with (single / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    refused(single, "has bytes after its tensors")


def test_a_missing_shard_is_refused(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    refused(sharded, SHARD, "is missing")


def test_missing_weights_are_refused(sharded: Path) -> None:
    for path in sharded.glob("*.safetensors*"):
        path.unlink()
    refused(sharded, "has neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/outside.safetensors",
        "sub\\outside.safetensors",
        "..",
        "",
        "config.json",
        "a.safetensors\n",
        7,
        None,
        ["x.safetensors"],
        "x" * 5000 + ".safetensors",
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(sharded: Path, shard: Any) -> None:
    (sharded.parent / "outside.safetensors").write_bytes((sharded / SHARD).read_bytes())
    name = f"{TEXT}ln_f.weight"
    edit_json(sharded / INDEX, lambda data: data["weight_map"].update({name: shard}))
    refused(sharded, INDEX, "not the plain name of a safetensors file")


def test_an_index_that_misplaces_a_tensor_is_refused(sharded: Path) -> None:
    name = f"{TEXT}ln_f.weight"
    other = SHARD.replace("00001", "00002", 1)
    edit_json(sharded / INDEX, lambda data: data["weight_map"].update({name: other}))
    refused(sharded, SHARD, name, "does not place there")


def test_an_index_with_a_tensor_too_many_is_refused(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda data: data["weight_map"].update({"more": SHARD}))
    refused(sharded, SHARD, "lacks tensor", "more")


def test_an_index_without_a_map_is_refused(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda data: data.update(weight_map=[]))
    refused(sharded, INDEX, "weight_map is []")


def write_header(path: Path, header: Any, data: bytes = bytes(16)) -> None:
    """A safetensors file with the given header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "fragment"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        ([], "expected a JSON object"),
        ({"x": 1}, "malformed"),
        ({"x": ENTRY | {"dtype": "F8_E4M3"}}, "has dtype"),
        ({"x": ENTRY | {"dtype": ["F32"]}}, "has dtype"),
        ({"x": ENTRY | {"dtype": "I64", "shape": [2]}}, "has dtype"),
        ({"x": ENTRY | {"shape": [-4]}}, "malformed shape"),
        ({"x": ENTRY | {"shape": []}}, "malformed shape"),
        ({"x": ENTRY | {"shape": [4.0]}}, "malformed shape"),
        ({"x": ENTRY | {"shape": [1] * 4000}}, "malformed shape"),
        ({"x": ENTRY | {"shape": [1 << 40, 1 << 40]}}, "byte range"),
        ({"x": ENTRY | {"data_offsets": [16, 0]}}, "byte range"),
        ({"x": ENTRY | {"data_offsets": [-16, 0]}}, "byte range"),
        ({"x": ENTRY | {"data_offsets": [0, 12]}}, "byte range"),
        ({"x": ENTRY | {"data_offsets": "0:16"}}, "byte range"),
        ({"x": ENTRY | {"data_offsets": [1 << 70, (1 << 70) + 16]}}, "gaps"),
        ({"x": ENTRY, "y": ENTRY}, "overlap"),
        (b'{"x": {"a": 1, "a": 2}}', "twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_malformed_header_is_refused(single: Path, header: Any, fragment: str) -> None:
    write_header(single / "model.safetensors", header)
    refused(single, "model.safetensors", fragment)


def test_a_huge_header_is_refused_before_it_is_read(single: Path) -> None:
    length = MAX_HEADER_BYTES + 1
    with (single / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(8 + length)  # zeros that take no room
    refused(single, "header is larger than 64 MiB")


def test_a_huge_number_of_tensors_is_refused(single: Path) -> None:
    names = map(str, range(MAX_TENSORS + 1))
    write_header(single / "model.safetensors", dict.fromkeys(names, ENTRY))
    refused(single, "model.safetensors", "has more than 131072 tensors")


def test_an_index_of_a_huge_number_of_tensors_is_refused(sharded: Path) -> None:
    names = map(str, range(MAX_TENSORS + 1))
    edit_json(sharded / INDEX, lambda data: data.update(weight_map=dict.fromkeys(names, SHARD)))
    refused(sharded, INDEX, "names more than 131072 tensors")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_folder_in_place_of_a_file_is_refused(single: Path, name: str) -> None:
    (single / name).unlink()
    (single / name).mkdir()
    refused(single, name, "is not a regular file")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("x")])
def test_a_checkpoint_has_to_be_a_folder(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "checkpoint")
    refused(tmp_path / "checkpoint", "no such checkpoint folder")
