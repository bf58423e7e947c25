"""Damaged and malicious bundles: refused with one clear line before an engine sees them."""

from __future__ import annotations

import os
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edge_vlm.bundle.checksums import verify
from edge_vlm.bundle.manifest import (
    DECODER_NAME,
    MAX_MANIFEST_BYTES,
    VISION_NAME,
    Bundle,
    parse_manifest,
)
from edge_vlm.errors import BundleError
from tests.bundle.damage import FILES, Change, drop, edit, flip, refused, set_in
from tests.toy.bundle import DECODER_BYTES, VISION_FILE, toy_manifest
from tests.toy.sizes import N_IDS


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as a parser of model files is used; llama.cpp is away in unit tests anyway."""

    def unexpected(*_: Any, **__: Any) -> None:
        pytest.fail("an engine was given a file that is not the manifest's")

    monkeypatch.setattr("onnxruntime.InferenceSession", unexpected)


# Files that differ from the manifest


@pytest.mark.usefixtures("no_engines")
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_before_anything_parses_the_file(folder: Path, name: str) -> None:
    path = folder / name
    size = path.stat().st_size
    for seed in range(50):
        rng = random.Random(seed)
        position, bit = rng.randrange(size), 1 << rng.randrange(8)
        flip(path, position, bit)
        refused(folder, f"{path}: its SHA-256 differs from the manifest")
        flip(path, position, bit)
    verify(Bundle.open(folder))


def test_a_flipped_bit_in_the_manifest_is_an_error_or_changes_only_words(folder: Path) -> None:
    """The manifest has no checksum of its own; what it decides is validated instead."""
    text = (folder / "bundle.json").read_bytes()
    n_refused = 0
    for seed in range(200):
        rng = random.Random(seed)
        damaged = bytearray(text)
        damaged[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        try:
            parse_manifest(bytes(damaged), "bundle.json")
        except BundleError as error:
            n_refused += str(error).isprintable()
    assert n_refused > 120


@pytest.mark.usefixtures("no_engines")
@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_names_both_sizes(folder: Path, name: str) -> None:
    path = folder / name
    size = path.stat().st_size
    for cut in sorted({0, 1, size - 1, *(size * i // 25 for i in range(1, 25))}, reverse=True):
        os.truncate(path, cut)
        refused(folder, f"{path}: has {cut} bytes, the manifest says {size}")


def test_a_cut_manifest(folder: Path) -> None:
    path = folder / "bundle.json"
    text = path.read_bytes()
    for step in range(25):
        path.write_bytes(text[: len(text) * step // 25])
        refused(folder, f"{path}: is not valid JSON")
    path.write_bytes(text[:-2])
    refused(folder, f"{path}: is not valid JSON")


@pytest.mark.usefixtures("no_engines")
def test_files_that_belong_elsewhere(folder: Path, tmp_path: Path) -> None:
    for name in FILES:
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(b"another model's" + good)
        refused(folder, str(folder / name), "bytes, the manifest says")
        os.truncate(folder / name, len(good))  # of the same size
        refused(folder, str(folder / name), "its SHA-256 differs")
        (folder / name).unlink()
        refused(folder, f"{folder / name}: No such file or directory")
        (folder / name).write_bytes(good)
    vision, decoder = (folder / name for name in FILES)
    vision.rename(tmp_path / "aside")
    decoder.rename(vision)
    (tmp_path / "aside").rename(decoder)
    refused(folder, str(vision), "the manifest says")


@pytest.mark.usefixtures("no_engines")
def test_an_older_manifest(folder: Path) -> None:
    files = {VISION_NAME: VISION_FILE.read_bytes(), DECODER_NAME: DECODER_BYTES[1:]}
    (folder / "bundle.json").write_text(toy_manifest(files).to_json(), encoding="utf-8")
    refused(folder, str(folder / DECODER_NAME), "the manifest says")


def test_a_file_that_is_not_listed_is_not_looked_at(folder: Path) -> None:
    (folder / "notes.txt").write_text("my own")
    (folder / "extra").mkdir()
    verify(Bundle.open(folder))


def test_folders_that_are_no_bundle(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, f"{empty}: is not a bundle, it has no bundle.json")
    refused(tmp_path / "none", f"{tmp_path / 'none'}: no such bundle folder")
    refused(folder / VISION_NAME, "no such bundle folder")
    refused(tmp_path / "a\nb", repr(str(tmp_path / "a\nb")), "no such bundle folder")
    refused(tmp_path / ("x" * 1000), "xxx")
    (folder / "bundle.json").unlink()
    os.mkfifo(folder / "bundle.json")
    refused(folder, "has no bundle.json")
    (folder / "bundle.json").unlink()
    (folder / "bundle.json").mkdir()
    refused(folder, "has no bundle.json")


# The manifest


BAD_VALUES: list[tuple[Change, str]] = [
    (set_in("format_version", to=4), "has format version 4, this edge-vlm reads up to 3; upgrade"),
    (set_in("format_version", to=2**63), "upgrade edge-vlm"),
    (set_in("format_version", to=0), "format_version"),
    (set_in("format_version", to=-1), "format_version"),
    (set_in("format_version", to=True), "format_version"),
    (set_in("format_version", to=1.0), "format_version"),
    (set_in("format_version", to="1"), "format_version"),
    (set_in("format_version", to=None), "format_version"),
    (drop("format_version"), "format_version: Field required"),
    (drop("model"), "model: Field required"),
    (drop("tokens", "bos"), "tokens.bos: Field required"),
    (drop("files", VISION_NAME), "files does not list vision.onnx"),
    (drop("files", DECODER_NAME), "files does not list decoder.gguf"),
    (set_in("files", to=[]), "files"),
    (set_in("files", to=None), "files"),
    (set_in("files", VISION_NAME, "size", to=-1), "files.vision.onnx.size"),
    (set_in("files", VISION_NAME, "size", to=2**63), "files.vision.onnx.size"),
    (set_in("files", VISION_NAME, "size", to=1.5), "files.vision.onnx.size"),
    (set_in("files", VISION_NAME, "size", to="12"), "files.vision.onnx.size"),
    (set_in("files", VISION_NAME, "sha256", to="0" * 63), "files.vision.onnx.sha256"),
    (set_in("files", VISION_NAME, "sha256", to="G" * 64), "files.vision.onnx.sha256"),
    (set_in("files", VISION_NAME, "sha256", to="0" * 64 + "\n"), "files.vision.onnx.sha256"),
    (set_in("files", to={f"f{i}": {"size": 0, "sha256": "0" * 64} for i in range(65)}), "files"),
    (set_in("surprise", to=1), "surprise: Extra inputs are not permitted"),
    (set_in("model", "a\nb\x1b[31m", to=1), r"a\nb\x1b[31m"),
    (set_in("model", "x" * 100_000, to=1), "model.xxx"),
    (set_in("model", "name", to=""), "model.name"),
    (set_in("model", "name", to="x" * 201), "model.name"),
    (set_in("model", "name", to="\x1b[31mred"), "model.name: contains a character that cannot"),
    (set_in("model", "name", to="a\nb"), "model.name: contains a character that cannot"),
    (set_in("model", "license", to="\u202eMIT"), "model.license: contains a character that"),
    (set_in("model", "source", to="a\0b"), "model.source: contains a character that cannot"),
    (set_in("created_with", to={"a\x07": "1"}), "contains a character that cannot be printed"),
    (set_in("decoder", "n_layers", to=0), "decoder.n_layers"),
    (set_in("decoder", "n_layers", to=-1), "decoder.n_layers"),
    (set_in("decoder", "n_layers", to=2**63), "decoder.n_layers"),
    (set_in("decoder", "n_layers", to=True), "decoder.n_layers"),
    (set_in("decoder", "n_layers", to=[]), "decoder.n_layers"),
    (set_in("decoder", "tied_head", to="yes"), "decoder.tied_head"),
    (set_in("vision", "output_size", to=3), "vision.output_size differs from decoder.hidden_size"),
    (set_in("image_processor", "patch_size", to=0), "image_processor.patch_size"),
    (set_in("image_processor", "patch_size", to=13), "not a multiple of patch_size"),
    (set_in("image_processor", "n_channels", to=4), "image_processor.n_channels"),
    (set_in("image_processor", "base_input_size", to=[126]), "image_processor.base_input_size"),
    (set_in("image_processor", "base_input_size", to=[(1 << 20) - 1] * 2), "multiple"),
    (set_in("image_processor", "base_input_size", to=[14 << 14, 14 << 14]), "image_processor"),
    (set_in("image_processor", "overlap_margins", to=[5, 4]), "overlap_margins leave no window"),
    (set_in("image_processor", "overlap_margins", to=[-1, 2]), "overlap_margins"),
    (set_in("image_processor", "token_length_h", to=6), "token_length 6x3 contradicts"),
    (set_in("image_processor", "max_crops", to=1025), "image_processor.max_crops"),
    (set_in("image_processor", "max_crops", to=0), "image_processor.max_crops"),
    (set_in("image_processor", "min_pixels", to=200_000), "min_pixels is larger than max_pixels"),
    (set_in("image_processor", "max_pixels", to=2**29), "image_processor.max_pixels"),
    (set_in("tokens", "bos", to=N_IDS), f"token id {N_IDS} is outside the vocabulary of {N_IDS}"),
    (set_in("tokens", "stop", to=[]), "tokens.stop"),
    (set_in("tokens", "stop", to=[-1]), "tokens.stop"),
    (set_in("tokens", "stop", to=[1] * 65), "tokens.stop"),
    (set_in("tokens", "special", to={"<|image|>": 2**40}), "tokens.special"),
    (set_in("tokens", "special", to={"<a>": 1}), "tokens.special lacks the image_prompt_token"),
    (set_in("tokens", "special", "", to=1), "tokens.special"),
    (set_in("tokens", "special", to={f"<{i}>": 1 for i in range(10_001)}), "tokens.special"),
    (set_in("prompt", "normalizer", to="NFKC"), "prompt.normalizer"),
    (set_in("prompt", "image_prompt_token", to="<other>"), "lacks the image_prompt_token"),
]


@pytest.mark.usefixtures("no_engines")
@pytest.mark.parametrize(("change", "reason"), BAD_VALUES, ids=[r for _, r in BAD_VALUES])
def test_a_manifest_with_a_bad_value(folder: Path, change: Change, reason: str) -> None:
    edit(folder, change)
    message = refused(folder, reason)
    assert message.startswith(f"{folder / 'bundle.json'}: ")


def bad_texts(good: str) -> dict[str, bytes]:
    n_layers = '"n_layers": 2'
    assert n_layers in good
    texts = {
        "empty": "",
        "text": "hello",
        "html": "<!doctype html>",
        "null": "null",
        "number": "1",
        "list": "[]",
        "half": "{",
        "two": good + good,
        "depth in lists": "[" * 10_000 + "]" * 10_000,
        "depth in objects": '{"a":' * 10_000 + "1" + "}" * 10_000,
        "depth beside": good.rstrip()[:-1] + ', "x": ' + "[" * 900 + "]" * 900 + "}",
        "duplicate": good.rstrip()[:-1] + ', "format_version": 1}',
        "duplicate inside": good.replace(n_layers, f"{n_layers}, {n_layers}", 1),
        "NaN": good.replace(n_layers, '"n_layers": NaN', 1),
        "Infinity": good.replace(n_layers, '"n_layers": -Infinity', 1),
        "huge float": good.replace(n_layers, '"n_layers": 1e999', 1),
        "huge integer": good.replace(n_layers, f'"n_layers": {"9" * 100_000}', 1),
        "comment": "// hi\n" + good,
        "surrogate": good.replace('"toy"', '"\\ud800"', 1),
    }
    return {
        **{name: text.encode() for name, text in texts.items()},
        "NUL": bytes(1000),
        "latin-1": good.replace('"toy"', '"é"', 1).encode("latin-1"),
        "utf-16": good.encode("utf-16"),
        "utf-32": good.encode("utf-32"),
        "byte order mark": good.encode("utf-8-sig"),
        "4 MiB and a byte": b" " * (MAX_MANIFEST_BYTES + 1 - len(good)) + good.encode(),
        "4 MiB of brackets": b"[" * (4 << 20),
        "4 MiB of keys": b"{" + b'"a":1,' * 600_000 + b'"a":1}',
    }


@pytest.mark.usefixtures("no_engines")
def test_manifests_that_are_not_one(folder: Path) -> None:
    path = folder / "bundle.json"
    good = path.read_text(encoding="utf-8")
    for name, text in bad_texts(good).items():
        path.write_bytes(text)
        started = time.process_time()
        message = refused(folder)
        assert message.startswith(f"{path}: "), name
        assert time.process_time() - started < 1, name
    path.write_text(good.rstrip() + " " * (MAX_MANIFEST_BYTES - len(good)), encoding="utf-8")
    Bundle.open(folder)


def test_a_manifest_of_100_megabytes_is_not_read(folder: Path) -> None:
    os.truncate(folder / "bundle.json", 100 << 20)
    tracemalloc.start()
    try:
        refused(folder, "is larger than 4 MiB")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


# Paths


@pytest.mark.usefixtures("no_engines")
@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/etc/passwd", "a/../../x", "a/b", "./vision.onnx", "..", ".", "", "a..b", "a."),
        *("a\\b", "..\\x", "C:x", "C:\\x", "\\\\server\\x", "a\0b", "a" * 101, "x" * 300),
        *("~", "-x", ".hidden", "a b", "a\n", "\u202ea", "vision\u200b.onnx", "．．/x", "ｖision"),
        *("NUL", "con", "CON.onnx", "aux.bin", "COM1", "lpt9.x", "%2e%2e", "file:x", "a*", "$HOME"),
    ],
)
def test_a_name_that_is_not_a_plain_file_name(folder: Path, name: str) -> None:
    edit(folder, lambda data: data["files"].update({name: data["files"][VISION_NAME]}))
    assert "is not a plain file name" in refused(folder, "bundle.json: ")


@pytest.mark.usefixtures("no_engines")
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_files_of_the_bundle(folder: Path, tmp_path: Path, name: str) -> None:
    path, outside = folder / name, tmp_path / "outside"
    path.rename(outside)
    (tmp_path / "far").mkdir()
    for target, reason in (
        (outside, "is a link that leads out of the bundle"),
        (Path("../outside"), "is a link that leads out of the bundle"),
        (Path("/dev/zero"), "is a link that leads out of the bundle"),
        (tmp_path / "far" / "missing", "No such file or directory"),
        (Path(name), name),  # a loop
    ):
        path.symlink_to(target)
        refused(folder, f"{path}: ", reason)
        path.unlink()
    path.mkdir()
    refused(folder, f"{path}: is not a regular file")
    path.rmdir()
    os.mkfifo(path)
    refused(folder, f"{path}: is not a regular file")
    path.unlink()
    path.symlink_to(folder / "fifo")
    os.mkfifo(folder / "fifo")
    refused(folder, f"{path}: is not a regular file")


def test_links_inside_and_hard_links_are_files_like_others(folder: Path, tmp_path: Path) -> None:
    """What counts is the content, which is compared with the checksum."""
    (folder / VISION_NAME).rename(folder / "blob")
    (folder / VISION_NAME).symlink_to("blob")
    (folder / DECODER_NAME).rename(tmp_path / "hard")
    os.link(tmp_path / "hard", folder / DECODER_NAME)
    verify(Bundle.open(folder))
    link = tmp_path / "link"
    link.symlink_to(folder)
    verify(Bundle.open(link))
