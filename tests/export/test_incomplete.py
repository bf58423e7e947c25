"""Folders that are not what they should be: pointers, pages, half downloads, other formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from edge_vlm_export.families.opened import Model

from tests.conftest import Run, assert_one_line
from tests.export_helpers import copy_checkpoint, edit_json, refused

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 12345\n" % (b"a" * 64)
PAGE = b"\n <!DOCTYPE html><html><head><title>Log in</title></head></html>"
S3 = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>'
EVERY_FILE = (
    *(SHARDS[0], INDEX, "config.json", "tokenizer.json", "tokenizer_config.json"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
    "chat_template.jinja",
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two shards that may be changed."""
    return copy_checkpoint("tiny-126-tied", tmp_path / "checkpoint")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint of one file, of the other family."""
    return copy_checkpoint("llava-onevision", tmp_path / "checkpoint")


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_git_lfs_pointer_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes(POINTER)
    refused(checkpoint, f"{name}: is a git-lfs pointer", "run `git lfs pull`")


def test_a_git_lfs_pointer_as_the_only_weights(single: Path) -> None:
    (single / "model.safetensors").write_bytes(POINTER)
    refused(single, "model.safetensors: is a git-lfs pointer", "run `git lfs pull`")


@pytest.mark.parametrize("page", [PAGE, S3, b"\xef\xbb\xbf<html>", PAGE.upper()])
@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_page_in_a_file_s_place_is_named(checkpoint: Path, name: str, page: bytes) -> None:
    (checkpoint / name).write_bytes(page)
    refused(checkpoint, f"{name}: is a web page", "download it again")


@pytest.mark.parametrize(
    "told",
    [
        {"error": "Repository not found"},
        {"message": "API rate limit exceeded", "documentation_url": "https://docs"},
        {"detail": "Not Found"},
        {"success": False, "errors": [{"code": 10000}]},
    ],
)
@pytest.mark.parametrize("name", [SHARDS[0], INDEX, "config.json", "tokenizer.json"])
def test_a_server_s_error_in_a_file_s_place_is_named(
    checkpoint: Path, name: str, told: Any
) -> None:
    (checkpoint / name).write_text(json.dumps(told), encoding="utf-8")
    refused(checkpoint, f"{name}: is a server's error message", next(iter(told)))


@pytest.mark.parametrize("name", [SHARDS[1], "tokenizer.json", "config.json"])
def test_zeros_in_a_file_s_place_are_named(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    path.write_bytes(bytes(path.stat().st_size))
    refused(checkpoint, f"{name}: begins with zeros", "was not finished")


@pytest.mark.parametrize("suffix", [".incomplete", ".part", ".crdownload", ".aria2"])
@pytest.mark.parametrize("name", [SHARDS[1], "tokenizer.json", "config.json"])
def test_half_a_download_beside_is_named(checkpoint: Path, name: str, suffix: str) -> None:
    (checkpoint / name).rename(checkpoint / (name + suffix))
    refused(checkpoint, f"{name}: is missing: {name}{suffix} is a download that was not finished")


def test_half_a_download_of_the_hub_s_client_is_named(checkpoint: Path) -> None:
    folder = checkpoint / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    (checkpoint / SHARDS[1]).rename(folder / "abc.def.incomplete")
    refused(checkpoint, f"{SHARDS[1]}: is missing", "abc.def.incomplete is a download that was not")


def test_a_link_to_nothing_is_named(checkpoint: Path) -> None:
    (checkpoint / SHARDS[1]).unlink()
    (checkpoint / SHARDS[1]).symlink_to(checkpoint / "blobs" / "abc")
    refused(checkpoint, f"{SHARDS[1]}: is missing: it is a link to", "which is not there")


def test_a_file_cut_short_is_named(checkpoint: Path) -> None:
    path = checkpoint / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-100])
    refused(checkpoint, f"{SHARDS[1]}: is cut off")


def test_several_shards_and_files_that_no_index_names(checkpoint: Path) -> None:
    before = Model(checkpoint).tensors.tensors
    shutil.copy(checkpoint / SHARDS[0], checkpoint / "model-00001-of-00009.safetensors")
    assert Model(checkpoint).tensors.tensors == before


def test_an_index_that_names_a_file_too_many(checkpoint: Path) -> None:
    edit_json(checkpoint / INDEX, lambda data: data["weight_map"].update(more="more.safetensors"))
    refused(checkpoint, "more.safetensors: is missing")


def test_an_index_beside_other_weights(single: Path) -> None:
    """Which of the two is meant cannot be told; an index of the one file is fine."""
    names = dict.fromkeys(Model(single).tensors.tensors, "model.safetensors")
    (single / INDEX).write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    Model(single)
    edit_json(single / INDEX, lambda data: data["weight_map"].update(a=SHARDS[0]))
    Model(single)  # a stale index
    shutil.copy(single / "model.safetensors", single / SHARDS[0])
    refused(single, "model.safetensors: is there", INDEX, SHARDS[0])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model.bin", "safe_serialization=True"),
        ("pytorch_model-00001-of-00002.bin", "safe_serialization=True"),
        ("consolidated.00.pth", "safe_serialization=True"),
        ("tf_model.h5", "another library"),
        ("flax_model.msgpack", "another library"),
        ("model-q4.gguf", "was made from"),
        ("zero_to_fp32.py", "zero_to_fp32.py . OUT"),
        ("adapter_model.safetensors", "export its base with --adapter"),
        ("__0_0.distcp", "accelerate merge-weights"),
    ],
)
def test_weights_of_another_format_say_what_to_do(single: Path, name: str, advice: str) -> None:
    (single / "model.safetensors").rename(single / name)
    refused(single, f"has no model.safetensors but {name}", advice)


def test_a_trainer_s_folder_names_its_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint.rename(folder / "checkpoint-500")
    refused(folder, "has no config.json, but", "checkpoint-500 has one")


def test_a_hub_cache_s_folder_names_its_snapshot(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--model"
    (folder / "snapshots").mkdir(parents=True)
    checkpoint.rename(folder / "snapshots" / "abc")
    refused(folder, "abc has one: export that folder")


def test_the_command_says_it_in_one_line(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / SHARDS[0]).write_bytes(POINTER)
    failed = run("export", checkpoint, "--out", tmp_path / "out")
    assert_one_line(failed, 2, SHARDS[0], "git lfs pull")
