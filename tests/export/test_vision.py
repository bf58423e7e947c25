"""``vision.onnx`` against the published implementation's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from edge_vlm_export.checkpoint.tensors import Checkpoint
from PIL import Image

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.families.jina_vlm.tiling import JinaTiles, cut_tiles
from tests.conftest import GOLDEN, GOLDEN_NAMES, GoldenCase, GoldenModel, golden_cases
from tests.export_helpers import copy_checkpoint, export_exact, set_key

pytestmark = pytest.mark.engine  # it exports models

Arrays = dict[str, npt.NDArray[Any]]
TAPS = ("vit_features", "image_features")
IMAGE_CASES = [case for case in golden_cases() if case.images]


def tapped(path: Path, *more: str) -> onnxruntime.InferenceSession:
    """The graph with inner values as further outputs."""
    model = onnx.load(path)
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known[name] for name in TAPS)
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in more
    )
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def run(session: onnxruntime.InferenceSession, tiles: JinaTiles) -> Arrays:
    """All outputs, one crop at a time to bound memory; batches are compared elsewhere."""
    names = [output.name for output in session.get_outputs()]
    parts = [
        session.run(names, {"crops": tiles.crops[i : i + 1], "is_last": tiles.is_last[i : i + 1]})
        for i in range(len(tiles.crops))
    ]
    return {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(names)}


def tiles_of(case: GoldenCase, folder: Path, index: int = 0) -> JinaTiles:
    """The crops of a case's picture."""
    with Image.open(case.images[index]) as image:
        pixels = np.asarray(image.convert("RGB"))
    return cut_tiles(pixels, Bundle.open(folder).manifest.image_processor)


def relative(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Largest difference, relative to the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", IMAGE_CASES, ids=str)
def test_features_equal_the_published_ones(case: GoldenCase, bundle: Callable[..., Path]) -> None:
    folder = bundle(case.model)
    found = run(tapped(folder / "vision.onnx"), tiles_of(case, folder))
    arrays = case.arrays
    rows = arrays["vit_row_index"]
    vit = found["vit_features"]
    assert relative(vit[0][rows], arrays["vit_rows_first"]) < 1e-4
    assert relative(vit[-1][rows], arrays["vit_rows_last"]) < 1e-4
    for name, key in (("vit_features", "vit"), ("image_features", "image_features")):
        values = found[name].astype(np.float64)
        scale = np.abs(values).sum(axis=(1, 2)).max()
        assert np.abs(values.sum(axis=(1, 2)) - arrays[f"{key}_sum"]).max() < 1e-4 * scale
        squares = (values**2).sum(axis=(1, 2))
        assert np.allclose(squares, arrays[f"{key}_sumsq"], rtol=1e-4)
    features = found["image_features"]
    assert features.shape == tuple(arrays["image_features_shape"])
    flat = features.reshape(-1, features.shape[-1])
    assert relative(flat[arrays["image_features_row_index"]], arrays["image_features_rows"]) < 1e-4
    if "image_features" in arrays:
        assert relative(features, arrays["image_features"]) < 1e-4


def test_the_blank_crop_is_zero_and_only_that(
    golden: dict[str, GoldenModel], bundle: Callable[..., Path]
) -> None:
    case = golden["tiny-378"].cases["image_panel_black_corner"]
    folder = bundle("tiny-378")
    tiles = tiles_of(case, folder)
    session = tapped(folder / "vision.onnx")
    features = run(session, tiles)["vit_features"]
    blank = case.data["per_image"][0]["blank_crops"]
    assert blank == [3]
    assert [i for i, crop in enumerate(features) if not crop.any()] == blank
    # A single value off by the smallest step makes it an ordinary crop.
    tiles.crops[3, 5, 7] = np.nextafter(np.float32(-1), np.float32(0))
    assert run(session, tiles)["vit_features"][3].any()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_plain_crop_of_another_colour_is_not_blank(
    value: float, bundle: Callable[..., Path]
) -> None:
    session = tapped(bundle("tiny-126-tied") / "vision.onnx")
    crops = np.full((1, *session.get_inputs()[0].shape[1:]), value, np.float32)
    (features,) = session.run(["vit_features"], {"crops": crops, "is_last": np.array([False])})
    assert features.any()


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_crops_do_not_influence_each_other(name: str, bundle: Callable[..., Path]) -> None:
    session = tapped(bundle(name) / "vision.onnx")
    shape = session.get_inputs()[0].shape[1:]
    rng = np.random.default_rng(0)
    crops = rng.uniform(-1, 1, (3, *shape)).astype(np.float32)
    crops[1] = -1
    is_last = np.array([True, False, False])
    whole = session.run(["embeddings"], {"crops": crops, "is_last": is_last})[0]
    for i in range(3):
        feed = {"crops": crops[i : i + 1], "is_last": is_last[i : i + 1]}
        assert relative(session.run(["embeddings"], feed)[0][0], whole[i]) < 1e-5


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_no_crops_give_no_embeddings_but_the_markers(
    name: str, bundle: Callable[..., Path]
) -> None:
    session = onnxruntime.InferenceSession(str(bundle(name) / "vision.onnx"))
    shape = session.get_inputs()[0].shape[1:]
    feed = {"crops": np.zeros((0, *shape), np.float32), "is_last": np.zeros(0, bool)}
    embeddings, markers = session.run(["embeddings", "marker_embeddings"], feed)
    assert embeddings.shape[0] == 0
    assert markers.any()


@pytest.mark.parametrize("vision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_outputs_carry_rows_of_the_decoder(
    name: str, vision: str, bundle: Callable[..., Path]
) -> None:
    folder = bundle(name, vision=vision)
    checkpoint = Checkpoint.open(GOLDEN / name / "checkpoint")
    table = np.concatenate(
        [
            checkpoint[f"model.language_model.embedding.{part}"].read()
            for part in ("embedding", "new_embedding")
        ]
    )
    tokens = Bundle.open(folder).manifest.tokens
    session = tapped(folder / "vision.onnx")
    crops = np.zeros((2, *session.get_inputs()[0].shape[1:]), np.float32)
    feed = {"crops": crops, "is_last": np.array([False, True])}
    embeddings, markers, features = session.run(
        ["embeddings", "marker_embeddings", "image_features"], feed
    )
    assert np.array_equal(markers, table[[tokens.im_start, tokens.im_col, tokens.im_end]])
    assert np.array_equal(embeddings, features + table[tokens.im_patch])
    assert np.abs(features[0] - features[1]).max() > 1e-3  # the last crop's padding vector


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_half_precision_weights_change_little(name: str, bundle: Callable[..., Path]) -> None:
    case = next(case for case in IMAGE_CASES if case.model == name)
    found = {
        vision: run(
            tapped(bundle(name, vision=vision) / "vision.onnx"), tiles_of(case, bundle(name))
        )
        for vision in ("fp32", "fp16")
    }
    for tap in TAPS:
        difference = relative(found["fp16"][tap], found["fp32"][tap])
        print(f"{name} {tap}: fp16 differs by {difference:.1e} of the largest value")
        assert difference < 5e-3


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_half_precision_stores_the_rounded_weights(name: str, bundle: Callable[..., Path]) -> None:
    stored = {
        vision: {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load(bundle(name, vision=vision) / "vision.onnx").graph.initializer
        }
        for vision in ("fp32", "fp16")
    }
    halved = [key for key, values in stored["fp16"].items() if values.dtype == np.float16]
    assert len(halved) > 20
    for key, values in stored["fp32"].items():
        if f"{key}.fp16" in halved:
            assert np.array_equal(stored["fp16"][f"{key}.fp16"], values.astype(np.float16)), key
        else:
            assert np.array_equal(stored["fp16"][key], values), key


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("vision", ["fp32", "fp16"])
def test_the_graph_is_valid_and_standard(
    name: str, vision: str, bundle: Callable[..., Path]
) -> None:
    path = bundle(name, vision=vision, target="portable") / "vision.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    assert all(tensor.data_location == 0 for tensor in model.graph.initializer)
    session = onnxruntime.InferenceSession(str(path))
    kinds = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
    assert kinds == {
        "crops": "tensor(float)",
        "is_last": "tensor(bool)",
        "embeddings": "tensor(float)",
        "marker_embeddings": "tensor(float)",
    }


def test_blocks_behind_the_last_used_state_are_left_out(tmp_path: Path) -> None:
    checkpoint = copy_checkpoint("tiny-378", tmp_path / "checkpoint", link_weights=True)
    set_key(checkpoint / "config.json", "vision_config.vit_layers", [-4, -6])
    folder = export_exact(checkpoint, tmp_path / "bundle")
    names = {tensor.name for tensor in onnx.load(folder / "vision.onnx").graph.initializer}
    layers = {name.split(".")[1] for name in names if name.startswith("layers.")}
    assert layers == {"0", "1", "2", "3"}
    assert Bundle.open(folder).manifest.vision.n_layers == 4
    assert not any("post_lnorm" in name for name in names)


@pytest.mark.parametrize("vision", ["fp32", "fp16"])
def test_large_weights_go_to_a_second_file(
    tmp_path: Path, vision: str, bundle: Callable[..., Path]
) -> None:
    name = "tiny-378"
    folder = export_exact(
        GOLDEN / name / "checkpoint", tmp_path / "bundle", vision=vision, external_data_bytes=1000
    )
    path = folder / "vision.onnx"
    assert set(Bundle.open(folder).manifest.files) == {
        "vision.onnx",
        "vision.onnx.data",
        "decoder.gguf",
    }
    onnx.checker.check_model(path)
    external = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.external_data
    ]
    assert len(external) > 20
    assert {entry["location"] for entry in external} == {"vision.onnx.data"}
    assert all(int(entry["offset"]) % 4096 == 0 for entry in external)
    assert path.stat().st_size < (folder / "vision.onnx.data").stat().st_size / 3

    session = onnxruntime.InferenceSession(str(path))
    inline = onnxruntime.InferenceSession(str(bundle(name, vision=vision) / "vision.onnx"))
    rng = np.random.default_rng(0)
    crops = rng.uniform(-1, 1, (1, *session.get_inputs()[0].shape[1:])).astype(np.float32)
    feed = {"crops": crops, "is_last": np.array([True])}
    for found, expected in zip(session.run(None, feed), inline.run(None, feed), strict=True):
        assert np.array_equal(found, expected)


def test_the_same_checkpoint_gives_the_same_bytes(
    tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    name = "tiny-126-tied"
    again = export_exact(
        GOLDEN / name / "checkpoint", tmp_path / "bundle", decoder="f32", name=name
    )
    for path in again.iterdir():
        assert path.read_bytes() == (bundle(name) / path.name).read_bytes()
