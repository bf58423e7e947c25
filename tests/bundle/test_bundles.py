"""Damaged and malicious bundles: refused with one clear line before an engine sees them."""

from __future__ import annotations

import os
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_vlm import EdgeVLM
from edge_vlm.bundle.checksums import verify
from edge_vlm.bundle.find import EMBEDDED, embedded_bundle, find_bundle, installed_names
from edge_vlm.bundle.manifest import (
    DECODER_NAME,
    MAX_MANIFEST_BYTES,
    VISION_NAME,
    Bundle,
    parse_manifest,
)
from edge_vlm.bundle.onnx_files import external_files
from edge_vlm.engines import Decoder
from edge_vlm.errors import BundleError
from edge_vlm.machine.folders import cache_folder
from tests.bundle.damage import Change, drop, edit, flip, record, set_in
from tests.fake_engine import FakeDecoder
from tests.toy.bundle import DECODER_BYTES, VISION_FILE, toy_manifest, write_toy_bundle
from tests.toy.sizes import N_IDS

FILES = (VISION_NAME, DECODER_NAME)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return write_toy_bundle(tmp_path / "bundle")


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as a parser of model files is used; llama.cpp is away in unit tests anyway."""

    def unexpected(*_: Any, **__: Any) -> None:
        pytest.fail("an engine was given a file that is not the manifest's")

    monkeypatch.setattr("onnxruntime.InferenceSession", unexpected)


def refused(path: str | Path, *words: str, decoder: Decoder | None = None) -> str:
    """The message, of one line, with which a bundle is refused; by default before the decoder."""
    with pytest.raises(BundleError) as caught:
        EdgeVLM.load(path, decoder=decoder)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable()
    assert len(message) < 1000
    for word in words:
        assert word in message
    return message


def refused_to_look(folder: Path, word: str) -> None:
    """The vision tower is loaded for the first picture."""
    with EdgeVLM.load(folder, decoder=FakeDecoder()) as vlm:
        assert vlm.ask((), "Hello", max_tokens=1).prompt_tokens > 1
        with pytest.raises(BundleError) as caught:
            vlm.ask(np.zeros((50, 50, 3), np.uint8), "What?", max_tokens=1)
    assert word in str(caught.value)
    assert str(caught.value).isprintable()


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


# ONNX files that would read others


def external(location: str, name: str = "w", **entries: str) -> TensorProto:
    """A tensor of four floats whose data are in another file."""
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "16", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph(
    nodes: list[onnx.NodeProto] | None = None, tensors: list[TensorProto] | None = None
) -> onnx.GraphProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    first = helper.make_node("Identity", ["x"], ["y"])
    return helper.make_graph([first, *(nodes or [])], "g", [x], [y], initializer=tensors or [])


def model(inner: onnx.GraphProto) -> onnx.ModelProto:
    opset = helper.make_opsetid("", 17)
    return helper.make_model(inner, opset_imports=[opset], ir_version=8)


def sparse(location: str, where: str) -> onnx.SparseTensorProto:
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    indices = numpy_helper.from_array(np.zeros(1, np.int64))
    out = external(location)
    return onnx.SparseTensorProto(
        values=out if where == "values" else values,
        indices=out if where == "indices" else indices,
        dims=[4],
    )


def with_attribute(**fields: Any) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.append(onnx.AttributeProto(name="a", **fields))
    return model(graph([node]))


def in_sparse_initializer(location: str, where: str) -> onnx.ModelProto:
    inner = graph()
    inner.sparse_initializer.append(sparse(location, where))
    return model(inner)


def in_function(location: str) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["c"], value=external(location))
    made = model(graph())
    made.functions.append(
        helper.make_function("d", "F", [], ["c"], [node], [helper.make_opsetid("", 17)])
    )
    return made


def in_function_default(location: str) -> onnx.ModelProto:
    made = in_function("")
    made.functions[0].node[0].ClearField("attribute")
    attribute = onnx.AttributeProto(name="a", t=external(location))
    made.functions[0].attribute_proto.append(attribute)
    return made


def in_training(location: str) -> onnx.ModelProto:
    made = model(graph())
    made.training_info.add(initialization=graph(tensors=[external(location)]))
    return made


PLACES: dict[str, Callable[[str], onnx.ModelProto]] = {
    "initializer": lambda to: model(graph(tensors=[external(to)])),
    "sparse values": lambda to: in_sparse_initializer(to, "values"),
    "sparse indices": lambda to: in_sparse_initializer(to, "indices"),
    "attribute": lambda to: with_attribute(t=external(to), type=4),
    "attribute's list": lambda to: with_attribute(tensors=[external(to)], type=9),
    "sparse attribute": lambda to: with_attribute(sparse_tensor=sparse(to, "values"), type=11),
    "sparse attribute's list": lambda to: with_attribute(
        sparse_tensors=[sparse(to, "indices")], type=12
    ),
    "subgraph": lambda to: with_attribute(g=graph(tensors=[external(to)]), type=5),
    "subgraphs": lambda to: with_attribute(graphs=[graph(tensors=[external(to)])], type=10),
    "subgraph's subgraph": lambda to: with_attribute(
        g=with_attribute(g=graph(tensors=[external(to)]), type=5).graph, type=5
    ),
    "function": in_function,
    "function's default": in_function_default,
    "training": in_training,
}


@pytest.mark.parametrize("place", PLACES)
def test_external_data_outside_the_bundle_is_refused_wherever_it_is_named(
    folder: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / VISION_NAME).write_bytes(PLACES[place]("../secret").SerializeToString())
    record(folder, VISION_NAME)
    assert external_files(folder / VISION_NAME) == {"../secret"}
    refused(
        folder,
        f"{folder / VISION_NAME}: reads '../secret', which is not a file of the bundle",
        decoder=FakeDecoder(),
    )


@pytest.mark.parametrize(
    "location",
    [
        *(
            "/etc/passwd",
            "../x",
            "a/../../x",
            "./decoder.gguf",
            "x",
            "",
            " decoder.gguf",
            "DECODER",
        ),
        *("decoder.gguf/", "decoder.gguf\0", "C:\\x", "..\\x", "*/_ORT_MEM_ADDR_/*", "\n\x1b[31m"),
    ],
)
def test_external_data_must_be_a_listed_file(folder: Path, location: str) -> None:
    (folder / VISION_NAME).write_bytes(PLACES["initializer"](location).SerializeToString())
    record(folder, VISION_NAME)
    unlisted = f"{folder / VISION_NAME}: reads {location!r}, which is not"
    refused(folder, unlisted, decoder=FakeDecoder())


def test_every_one_of_two_locations_counts(folder: Path) -> None:
    tensor = external(DECODER_NAME)
    tensor.external_data.add(key="location", value="/etc/passwd")
    (folder / VISION_NAME).write_bytes(model(graph(tensors=[tensor])).SerializeToString())
    record(folder, VISION_NAME)
    refused(folder, "reads '/etc/passwd'", decoder=FakeDecoder())
    assert external_files(folder / VISION_NAME) == {DECODER_NAME, "/etc/passwd"}


def test_external_data_inside_the_bundle_is_read(folder: Path, tmp_path: Path) -> None:
    """A vision tower's weights in a listed file of their own, and in a link out of the bundle."""
    made = onnx.load(folder / VISION_NAME)
    onnx.save(
        made,
        folder / VISION_NAME,
        save_as_external_data=True,
        location="vision.onnx.data",
        size_threshold=1024,
    )
    assert external_files(folder / VISION_NAME) == {"vision.onnx.data"}
    record(folder, VISION_NAME)
    unlisted = "reads 'vision.onnx.data', which is not a file of the bundle"
    refused(folder, unlisted, decoder=FakeDecoder())
    record(folder, "vision.onnx.data")
    with EdgeVLM.load(folder, decoder=FakeDecoder()) as vlm:
        assert vlm.ask((), "Hello", max_tokens=1).prompt_tokens > 1
    (folder / "vision.onnx.data").rename(tmp_path / "out")
    (folder / "vision.onnx.data").symlink_to(tmp_path / "out")
    refused(folder, f"{folder / 'vision.onnx.data'}: is a link that leads out of the bundle")


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def nested_graphs(depth: int) -> bytes:
    inner = b""
    for _ in range(depth):
        inner = field(1, field(5, field(6, inner)))  # node, attribute, graph
    return field(7, inner)


MALFORMED = {
    "empty": b"",
    "text": b"this is not protobuf at all",
    "cut": field(7, b"x" * 100)[:-1],
    "length of 2^63": b"\x3a" + varint(2**63),
    "number without end": b"\x3a" + b"\xff" * 20,
    "cut number": b"\x3a\xff",
    "groups": b"\x3b\x3c",
    "wire type 7": b"\x3f",
    "cut fixed64": b"\x39\0\0\0",
    "cut fixed32": b"\x3d\0",
    "depth": nested_graphs(1000),
    "many fields": b"\x08\x01" * 5_000_000,
    "not UTF-8": field(7, field(5, field(13, field(1, b"location") + field(2, b"\xff\xfe")))),
    "long entry": field(7, field(5, field(13, field(1, b"location") + field(2, b"a" * 5000)))),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_graphs_that_are_no_protobuf(tmp_path: Path, name: str) -> None:
    path = tmp_path / VISION_NAME
    path.write_bytes(MALFORMED[name])
    started = time.process_time()
    with pytest.raises(BundleError) as caught:
        external_files(path)
    assert time.process_time() - started < 5
    assert str(caught.value).startswith(f"{path}: is not a valid ONNX file (")
    assert str(caught.value).isprintable()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scan") / VISION_NAME


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_scanned_or_refused(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)
    try:
        found = external_files(scratch)
    except BundleError:
        return
    assert all(isinstance(name, str) for name in found)


@pytest.mark.parametrize("output", ["embeddings", "marker_embeddings"])
def test_a_graph_with_one_output_of_another_shape(folder: Path, output: str) -> None:
    path = folder / VISION_NAME
    changed = onnx.load(path)
    (value,) = (value for value in changed.graph.output if value.name == output)
    changed.graph.node.add(
        op_type="Concat", input=[output, output], output=["twice"]
    ).attribute.add(name="axis", type=onnx.AttributeProto.INT, i=-1)
    for node in changed.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = {output: "once", "twice": output}.get(name, name)
    value.name = output
    value.type.tensor_type.shape.dim[-1].dim_value *= 2
    path.write_bytes(changed.SerializeToString())
    record(folder, VISION_NAME)
    refused_to_look(folder, f"{path}: its inputs and outputs are not those of the manifest")


def test_a_graph_with_another_interface_and_one_that_does_not_load(folder: Path) -> None:
    path = folder / VISION_NAME
    path.write_bytes(model(graph()).SerializeToString())
    record(folder, VISION_NAME)
    refused_to_look(folder, f"{path}: its inputs and outputs are not those of the manifest")
    path.write_bytes(
        model(graph([helper.make_node("NoSuchOperator", ["x"], ["z"])])).SerializeToString()
    )
    record(folder, VISION_NAME)
    refused_to_look(folder, f"{path}: onnxruntime cannot load it")
    path.write_bytes(b"\x08\x01")
    record(folder, VISION_NAME)
    refused_to_look(folder, f"{path}: onnxruntime cannot load it")


# Names of models


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "-x", "--help", "a b", "a\nb", "a\0b", "%2e%2e", "a\\b", "C:x", "~", "*"),
        *(
            "x" * 101,
            "x" * 1000,
            "x" * 100_000,
            "é",
            "．．",
            "CON",
            "nul",
            "aux.x",
            "COM7",
            "$HOME",
        ),
    ],
)
def test_what_is_no_name_of_a_model(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if name in (".", ".."):
        refused(name, "is not a bundle")
        return
    with pytest.raises(BundleError, match="is not the name of a model"):
        find_bundle(name)
    refused(name)


def test_paths_are_paths(tmp_path: Path) -> None:
    for path in ("../../etc/passwd", "/etc", "a//b", "./x"):
        assert find_bundle(path) == Path(path)
        refused(path, path.replace("//", "/").removeprefix("./"))


def test_names_of_installed_bundles(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    monkeypatch.setenv("EDGE_VLM_BUNDLES", str(installed))
    folder.rename(installed / "mine")
    (installed / "a\nb").mkdir()
    (installed / "file").write_text("no folder")
    assert installed_names() == [EMBEDDED, "mine"]
    assert find_bundle("mine") == installed / "mine"
    monkeypatch.setenv("EDGE_VLM_MODEL", "mine")
    assert find_bundle() == installed / "mine"
    assert find_bundle("demo") == embedded_bundle()
    with pytest.raises(BundleError, match=r"^file: no such model; .* one of demo, mine$"):
        find_bundle("file")


def test_a_folder_of_bundles_that_is_missing_or_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_VLM_BUNDLES", str(tmp_path / "none"))
    assert installed_names() == [EMBEDDED]

    def denied(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    assert installed_names() == [EMBEDDED]


# Remembering what was hashed


def hashed_by_verify(folder: Path, **options: Any) -> set[str]:
    """Names of the files that are hashed, where every file counts as large."""
    opened = Bundle.open(folder)
    sizes = {name: opened.manifest.files[name].size for name in FILES}
    totals = {0}
    verify(opened, always=0, progress=lambda _, total: totals.add(total), **options)
    found = {sum(sizes[name] for name in names): set(names) for names in ((), *zip(FILES), FILES)}
    assert len(found) == 4
    return found[max(totals)]


def test_a_large_file_is_hashed_once_until_it_changes(folder: Path) -> None:
    both = set(FILES)
    assert hashed_by_verify(folder) == both
    assert hashed_by_verify(folder) == set()
    assert hashed_by_verify(folder, again=True) == both
    os.utime(folder / VISION_NAME, ns=(1, 1))
    assert hashed_by_verify(folder) == {VISION_NAME}
    flip(folder / DECODER_NAME, 1000, 1)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        hashed_by_verify(folder)
    flip(folder / DECODER_NAME, 1000, 1)
    assert hashed_by_verify(folder) == {DECODER_NAME}


def test_content_changed_under_the_old_time_is_found(folder: Path) -> None:
    hashed_by_verify(folder)
    path = folder / DECODER_NAME
    times = path.stat()
    flip(path, 1000, 1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(BundleError, match="SHA-256 differs"):
        hashed_by_verify(folder)


def test_another_manifest_makes_what_was_remembered_worthless(folder: Path) -> None:
    hashed_by_verify(folder)
    edit(folder, set_in("files", DECODER_NAME, "sha256", to="0" * 64))
    with pytest.raises(BundleError, match="SHA-256 differs"):
        hashed_by_verify(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"decoder.gguf": 3}']
)
def test_a_damaged_memory_is_ignored(folder: Path, content: bytes) -> None:
    hashed_by_verify(folder)
    (memory,) = (cache_folder() / "verified").iterdir()
    memory.write_bytes(content)
    assert hashed_by_verify(folder) == set(FILES)
    assert hashed_by_verify(folder) == set()
    assert [path.name for path in memory.parent.iterdir()] == [memory.name]


def test_no_memory_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("EDGE_VLM_CACHE", str(blocked))
    for _ in range(2):
        assert hashed_by_verify(folder) == set(FILES)


def test_progress_counts_every_byte(folder: Path) -> None:
    opened = Bundle.open(folder)
    total = sum(entry.size for entry in opened.manifest.files.values())
    steps: list[tuple[int, int]] = []
    verify(opened, progress=lambda done, of: steps.append((done, of)))
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)
