"""ONNX files: what they would read besides, and graphs that are not what the manifest says."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_vlm import EdgeVLM
from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME
from edge_vlm.bundle.onnx_files import check_graph, external_files
from edge_vlm.errors import BundleError
from tests.bundle.damage import record, refused
from tests.fake_engine import FakeDecoder


def refused_to_look(folder: Path, word: str) -> None:
    """The vision tower is loaded for the first picture."""
    with EdgeVLM.load(folder, decoder=FakeDecoder()) as vlm:
        assert vlm.ask((), "Hello", max_tokens=1).prompt_tokens > 1
        with pytest.raises(BundleError) as caught:
            vlm.ask(np.zeros((50, 50, 3), np.uint8), "What?", max_tokens=1)
    assert word in str(caught.value)
    assert str(caught.value).isprintable()


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


@pytest.mark.limits
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
    path.write_bytes(model(graph([helper.make_node("Add", ["x"], ["z"])])).SerializeToString())
    record(folder, VISION_NAME)
    refused_to_look(folder, f"{path}: onnxruntime cannot load it")
    path.write_bytes(b"\x08\x01")
    record(folder, VISION_NAME)
    refused_to_look(folder, f"{path}: onnxruntime cannot load it")


def checked(path: Path, content: bytes, *more: str) -> None:
    path.write_bytes(content)
    check_graph(path, {VISION_NAME}, more)


def body() -> onnx.GraphProto:
    """One round of a loop."""
    values = [
        helper.make_tensor_value_info(name, kind, [])
        for name, kind in (("i", TensorProto.INT64), ("on", TensorProto.BOOL))
    ]
    out = helper.make_tensor_value_info("still", TensorProto.BOOL, [])
    node = helper.make_node("Identity", ["on"], ["still"])
    return helper.make_graph([node], "body", values, [out])


def of_operator(domain: str, name: str) -> onnx.ModelProto:
    return model(graph([helper.make_node(name, ["x"], ["z"], domain=domain)]))


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "loop": (
        lambda: model(graph([helper.make_node("Loop", ["n", "on"], [], body=body())])),
        "has a loop or a branch, which no vision tower needs",
    ),
    "loop without a body": (
        lambda: model(graph([helper.make_node("Loop", ["n", "on"], ["z"])])),
        "has the operator 'Loop', which is not allowed",
    ),
    "branch": (
        lambda: model(graph([helper.make_node("If", ["x"], ["z"], then_branch=body())])),
        "has a loop or a branch",
    ),
    "graphs of an allowed operator": (
        lambda: with_attribute(graphs=[graph()], type=10),
        "has a loop or a branch",
    ),
    "function": (lambda: in_function(VISION_NAME), "has a function of its own"),
    "training": (lambda: in_training(VISION_NAME), "has a training graph"),
    "sparse": (lambda: in_sparse_initializer(VISION_NAME, "values"), "has a sparse tensor"),
    "sparse attribute": (
        lambda: with_attribute(sparse_tensor=sparse(VISION_NAME, "values"), type=11),
        "has a sparse tensor",
    ),
    **{
        f"{domain} {name}": (
            partial(of_operator, domain, name),
            f"has the operator {f'{domain}.{name}'.lstrip('.')!r}, which is not allowed",
        )
        for domain, name in (
            ("", "Scan"),
            ("", "SequenceMap"),
            ("", "RandomNormal"),
            ("", "MatMulNBits"),
            ("com.microsoft", "EPContext"),
            ("com.microsoft", "Add"),
            ("ai.onnx.ml", "Add"),
            ("d", "F"),
        )
    },
    "a name for the terminal": (
        partial(of_operator, "", "\x1b]0;x\x07"),
        r"has the operator '\x1b]0;x\x07', which is not allowed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_exported_graph_has_is_refused(tmp_path: Path, name: str) -> None:
    make, words = REFUSED[name]
    path = tmp_path / VISION_NAME
    with pytest.raises(BundleError) as caught:
        checked(path, make().SerializeToString())
    assert str(caught.value).startswith(f"{path}: {words}")
    assert str(caught.value).isprintable()


def test_a_loop_of_a_billion_is_refused_when_the_bundle_is_loaded(folder: Path) -> None:
    (folder / VISION_NAME).write_bytes(REFUSED["loop"][0]().SerializeToString())
    record(folder, VISION_NAME)
    refused(folder, f"{folder / VISION_NAME}: has a loop or a branch", decoder=FakeDecoder())


def test_a_family_may_allow_more(tmp_path: Path) -> None:
    path = tmp_path / VISION_NAME
    content = of_operator("", "Sin").SerializeToString()
    with pytest.raises(BundleError, match="has the operator 'Sin', which is not allowed"):
        checked(path, content)
    checked(path, content, "Sin")
    content = of_operator("d", "Sin").SerializeToString()
    with pytest.raises(BundleError, match=r"has the operator 'd\.Sin', which is not allowed"):
        checked(path, content, "Sin")


def test_every_operator_that_is_written_twice_counts(tmp_path: Path) -> None:
    """protobuf's readers take the last of two values."""
    twice = field(7, field(1, field(4, b"Loop") + field(4, b"Add")))
    with pytest.raises(BundleError, match="has the operator 'Loop'"):
        checked(tmp_path / VISION_NAME, twice)
    domains = field(7, field(1, field(4, b"Add") + field(7, b"d") + field(7, b"")))
    with pytest.raises(BundleError, match=r"has the operator 'd\.Add'"):
        checked(tmp_path / VISION_NAME, domains)


LOCATION = field(1, b"location") + field(2, b"/etc/passwd")
TAG = b"\x6a"  # field 13 of a tensor: an entry about external data
HIDDEN = {
    "over 2^32": b"\xea\x80\x80\x80\x10",
    "over 2^35": b"\xea\x80\x80\x80\x80\x01",
    "longer than needed": b"\xea\x00",
    "as long as can be": b"\xea\x80\x80\x80\x00",
    "longer than can be": b"\xea\x80\x80\x80\x80\x80\x80\x80\x80\x00",
    "of field 0": b"\x02",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_entries_behind_a_tag_that_readers_cut_are_refused(folder: Path, name: str) -> None:
    entry = varint(len(LOCATION)) + LOCATION
    path = folder / VISION_NAME
    path.write_bytes(field(7, field(5, TAG + entry)))
    assert external_files(path) == {"/etc/passwd"}
    path.write_bytes(field(7, field(5, HIDDEN[name] + entry)))
    record(folder, VISION_NAME)
    refused(folder, f"{path}: is not a valid ONNX file (a ", decoder=FakeDecoder())


@pytest.mark.parametrize(
    "length",
    [b"\x81\x80\x80\x80\x10", b"\x81\x80\x80\x80\x08", b"\x81\x00", b"\x80\x80\x80\x80\x08"],
)
def test_lengths_that_readers_cut_or_refuse_are_refused(tmp_path: Path, length: bytes) -> None:
    path = tmp_path / VISION_NAME
    path.write_bytes(b"\x3a" + length + bytes(1000))
    with pytest.raises(BundleError, match=r"is not a valid ONNX file \(a number is too large or"):
        external_files(path)
