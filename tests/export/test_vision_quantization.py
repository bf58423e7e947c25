"""Quantized vision graphs: what they contain, what they compute, and what they may lose."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from edge_vlm_export import export_checkpoint
from edge_vlm_export.families.opened import Model
from edge_vlm_export.graph import integers
from edge_vlm_export.graph.precision import Range, Recipe
from edge_vlm_export.samples.crops import CalibrationTiles, calibration_tiles, cut_pictures
from edge_vlm_export.vision.calibration import (
    Inputs,
    calibrate,
    clipped_range,
    input_range,
    round_to,
)
from edge_vlm_export.vision.error_budget import Loss, fit, loss
from edge_vlm_export.vision.stagewise import StagedTower
from edge_vlm_export.vision.vision_file import VisionFile, write_vision
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from safetensors.numpy import load_file, save_file

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import BundleError, InputError
from edge_vlm.families.jina_vlm.tiling import cut_tiles
from edge_vlm.pictures.tower import OnnxTower
from tests.conftest import GOLDEN
from tests.export_helpers import edit_json, int8_products_saturate

pytestmark = pytest.mark.engine  # it exports models

DEMO = Path(__file__).parents[2] / "models" / "demo" / "checkpoint"
TINY = GOLDEN / "tiny-126-tied" / "checkpoint"
QUANTIZED = ("int8", "int8-static", "int4")
LAYOUTS = [(precision, target) for precision in QUANTIZED for target in ("cpu", "portable")]
VISION = "model.vision_model."

Floats = npt.NDArray[np.float32]
Write = Callable[..., tuple[Path, VisionFile]]


class Source:
    """A checkpoint, opened, and its tiles."""

    def __init__(self, folder: Path, n_tiles: int) -> None:
        self.model = Model(folder)
        self.settings = self.model.settings
        self.tower = StagedTower(self.model)
        self.tiles = calibration_tiles("builtin", self.model, n_tiles)

    def write(
        self,
        path: Path,
        precision: str = "int8",
        target: str = "cpu",
        batch: int | None = None,
        **options: Any,
    ) -> VisionFile:
        recipe = Recipe(precision, target, batch)
        return write_vision(self.model, path, self.tiles, recipe, **options)


@pytest.fixture(scope="module")
def tiny() -> Source:
    return Source(TINY, n_tiles=3)


@pytest.fixture(scope="module")
def write(tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """``write(precision, target)``: the tiny checkpoint's graph and its report, made once."""
    made: dict[tuple[str, str], tuple[Path, VisionFile]] = {}

    def get(precision: str, target: str) -> tuple[Path, VisionFile]:
        key = (precision, target)
        if key not in made:
            path = tmp_path_factory.mktemp("vision") / "vision.onnx"
            written = tiny.write(path, precision=precision, target=target, fit_budget=False)
            made[key] = path, written
        return made[key]

    return get


def embeddings(model: Path | bytes, tiles: CalibrationTiles) -> Floats:
    session = onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), providers=["CPUExecutionProvider"]
    )
    feed = tiles.feed
    found: Floats = session.run(["embeddings"], feed)[0]
    return found


@pytest.mark.parametrize(("precision", "target"), [*LAYOUTS, ("fp16", "cpu"), ("fp32", "cpu")])
def test_every_layout_computes_nearly_the_same(
    precision: str, target: str, tiny: Source, write: Write
) -> None:
    if precision.startswith("int8") and int8_products_saturate():
        pytest.skip("this processor's int8 products saturate")
    exact = embeddings(write("fp32", "portable")[0], tiny.tiles)
    path, written = write(precision, target)
    found = embeddings(path, tiny.tiles)
    measured = loss(found, exact)
    limit = {"fp32": 1e-5, "fp16": 5e-3, "int4": 0.5}.get(precision, 0.15)
    assert measured.error_mean < limit
    assert {written.recipe.of(name) for name in tiny.tower.products} == {precision}


@pytest.mark.parametrize(("precision", "target"), LAYOUTS)
def test_the_report_tells_what_the_file_does(
    precision: str, target: str, tiny: Source, write: Write
) -> None:
    path, written = write(precision, target)
    report = written.report
    model = onnx.load(path)
    model.graph.output.extend(v for v in model.graph.value_info if v.name == "image_features")
    session = onnxruntime.InferenceSession(model.SerializeToString())
    features = np.concatenate(
        [
            session.run(
                ["image_features"],
                {name: values[i : i + 1] for name, values in tiny.tiles.feed.items()},
            )[0]
            for i in range(len(tiny.tiles))
        ]
    ).astype(np.float64)
    exact = tiny.tower.features(Recipe(), tiny.tiles).astype(np.float64)
    cosine = (features * exact).sum(-1) / np.linalg.norm(features, axis=-1)
    cosine /= np.linalg.norm(exact, axis=-1)
    assert report.cosine_mean == pytest.approx(cosine.mean(), abs=2e-5)
    assert report.cosine_worst == pytest.approx(np.percentile(cosine, 1), abs=2e-4)
    error = np.linalg.norm(features - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert report.error_mean == pytest.approx(error.mean(), abs=2e-3)
    assert report.n_bytes == path.stat().st_size
    assert report.bits_per_weight == pytest.approx(8 * report.n_bytes / tiny.tower.n_weights)


@pytest.mark.parametrize("precision", [*QUANTIZED, "fp16", "fp32"])
def test_portable_graphs_are_standard(precision: str, write: Write) -> None:
    path, _ = write(precision, "portable")
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize(
    ("precision", "operators"),
    [
        ("int8", {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}),
        ("int8-static", {"MatMulIntegerToFloat"}),
        ("int4", {"MatMulNBits"}),
    ],
)
def test_cpu_graphs_use_the_fused_operators(
    precision: str, operators: set[str], tiny: Source, write: Write
) -> None:
    model = onnx.load(write(precision, "cpu")[0])
    contrib = {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}
    assert contrib == operators | {"MultiHeadAttention", "FastGelu"}
    n_products = sum(node.op_type in operators for node in model.graph.node)
    # With integers, Q, K and V, K and V, and the projector's halves are products of their own.
    n_layers = tiny.settings.vision.n_used_layers
    more = 0 if precision == "int4" else 2 * n_layers + 2
    assert n_products == len(tiny.tower.products) + more
    assert not any(node.op_type == "MatMul" for node in model.graph.node)


@pytest.mark.parametrize(
    ("precision", "type_"),
    [
        ("int8", onnx.TensorProto.INT8),
        ("int8-static", onnx.TensorProto.INT8),
        ("int4", onnx.TensorProto.INT4),
    ],
)
def test_portable_weights_are_integers(precision: str, type_: int, write: Write) -> None:
    model = onnx.load(write(precision, "portable")[0])
    stored = {t.name: t.data_type for t in model.graph.initializer}
    ups = {name: kind for name, kind in stored.items() if "ffn.up.int" in name}
    assert len(ups) >= 2
    assert set(ups.values()) == {type_}


@pytest.mark.parametrize(("precision", "target"), LAYOUTS)
def test_the_contract_holds_for_blank_and_for_no_crops(
    precision: str, target: str, tiny: Source, write: Write
) -> None:
    path, _ = write(precision, target)
    model = onnx.load(path)
    model.graph.output.extend(v for v in model.graph.value_info if v.name == "vit_features")
    session = onnxruntime.InferenceSession(model.SerializeToString())
    crops = tiny.tiles.crops[:2].copy()
    crops[1] = -1
    features = session.run(["vit_features"], {"crops": crops, "is_last": np.zeros(2, bool)})[0]
    assert features[0].any()
    assert not features[1].any()
    none = {"crops": crops[:0], "is_last": np.zeros(0, bool)}
    found, markers = session.run(["embeddings", "marker_embeddings"], none)
    assert len(found) == 0
    assert len(markers) == 3


@pytest.mark.parametrize(("precision", "target"), [("int8", "portable"), ("int8-static", "cpu")])
def test_a_fixed_batch_leaves_no_shape_open(
    precision: str, target: str, tiny: Source, write: Write, tmp_path: Path
) -> None:
    path = tmp_path / "vision.onnx"
    options = {"precision": precision, "target": target, "fit_budget": False}
    fixed = tiny.write(path, batch=1, **options)
    session = onnxruntime.InferenceSession(str(path))
    for value in (*session.get_inputs(), *session.get_outputs()):
        assert all(isinstance(size, int) for size in value.shape), value.name
    assert session.get_inputs()[0].shape[0] == 1
    free = write(precision, target)[1]
    assert fixed.report.cosine_mean == pytest.approx(free.report.cosine_mean, abs=1e-6)


def replace_vision(bundle: Path, target: Path, write: Callable[[Path], object]) -> Bundle:
    """A copy of a bundle with another vision graph, described truly."""
    shutil.copytree(bundle, target)
    write(target / "vision.onnx")
    data = (target / "vision.onnx").read_bytes()
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(target / "bundle.json", lambda json: json["files"].update({"vision.onnx": record}))
    return Bundle.open(target)


def test_the_runtime_takes_graphs_for_exactly_one_crop(
    tiny: Source, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    original = bundle("tiny-126-tied")
    fixed = export_checkpoint(
        TINY, tmp_path / "fixed", vision="fp32", decoder="f32", static_shapes=True
    )
    white = np.full((100, 150, 3), 255, np.uint8)
    tiles = cut_tiles(white, tiny.settings.image_processor)
    towers = [OnnxTower(Bundle.open(path)) for path in (original, fixed)]
    first, second = (tower.encode(tiles) for tower in towers)
    assert np.abs(first - second).max() < 1e-5 * np.abs(first).max()
    assert np.array_equal(*(tower.marker_embeddings for tower in towers))

    two = replace_vision(
        original,
        tmp_path / "two",
        lambda path: tiny.write(path, precision="fp32", target="portable", batch=2),
    )
    with pytest.raises(BundleError, match="takes 2 crops at a time"):
        OnnxTower(two).load()


def test_moved_channels_leave_the_function_as_it_is(tiny: Source) -> None:
    exact, recipe = calibrate(tiny.tower, Recipe("int8", "cpu"), tiny.tiles, smooth=True)
    assert len(recipe.rows) > 5
    kept = recipe.keeping(dict.fromkeys(tiny.tower.products, "fp32"))
    found = tiny.tower.features(kept, tiny.tiles)
    assert loss(found, exact).error_worst < 1e-5


def plant_outliers(checkpoint: Path, target: Path) -> Path:
    """A checkpoint with a few huge channels that computes the same, up to GELU near zero.

    One channel of every norm is 300 times as large, and the next layer's weights for it are as much
    smaller. Two hidden units of one block are moved to where GELU is the identity and made large
    too, which no norm can undo.
    """
    target.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).symlink_to(path.resolve())
    tensors = {
        name: values.astype(np.float32)
        for name, values in load_file(checkpoint / "model.safetensors").items()
    }
    layers = {name.split(".")[3] for name in tensors if name.startswith(f"{VISION}layers.")}
    for layer in layers:
        prefix = f"{VISION}layers.{layer}."
        for norm, reader in (("attn_lnorm", "attn.qkv_w"), ("ffn_lnorm", "ffn.up")):
            tensors[f"{prefix}{norm}.weight"][7] *= 300
            tensors[f"{prefix}{norm}.bias"][7] *= 300
            tensors[f"{prefix}{reader}.weight"][:, 7] /= 300
    prefix = f"{VISION}layers.1.ffn."
    up, down = tensors[f"{prefix}up.weight"], tensors[f"{prefix}down.weight"]
    up[:2] *= 4
    tensors[f"{prefix}up.bias"][:2] = 800
    tensors[f"{prefix}down.bias"] -= 800 * down[:, :2].sum(axis=1)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_planted_outliers_ruin_plain_rounding_and_not_the_export(
    precision: str, tmp_path: Path
) -> None:
    if int8_products_saturate():
        pytest.skip("this processor's int8 products saturate")
    source = Source(plant_outliers(DEMO, tmp_path / "checkpoint"), n_tiles=3)
    exact, plain = calibrate(source.tower, Recipe(precision, "cpu"), source.tiles, smooth=False)
    naive = loss(source.tower.features(plain, source.tiles), exact).cosine_mean
    written = source.write(tmp_path / "vision.onnx", precision=precision, min_cosine=0.995)
    report, unkept = written.report, written.unkept
    assert unkept is not None
    print(
        f"{precision}: naive {naive:.4f}, channels moved {unkept.cosine_mean:.4f},"
        f" {len(report.kept)} kept {report.cosine_mean:.4f} ({', '.join(report.kept)})"
    )
    assert naive < 0.9
    assert naive < unkept.cosine_mean < 0.995
    assert report.cosine_worst >= report.min_cosine_worst
    assert report.cosine_mean >= 0.995
    assert report.kept == ("layers.1.ffn.down",)
    assert written.recipe.of("layers.1.ffn.down") == "fp16"


def test_the_budget_keeps_no_more_than_it_needs(tiny: Source) -> None:
    """All smaller sets of the most sensitive products fail, the chosen one passes."""
    exact, recipe = calibrate(tiny.tower, Recipe("int4", "cpu"), tiny.tiles, smooth=True)
    found = fit(tiny.tower, recipe, tiny.tiles, exact, 0.99)
    assert found.after.meets(0.99)
    assert not found.before.meets(0.99)
    order = sorted(found.sensitivity, key=lambda name: -found.sensitivity[name])
    kept = list(found.recipe.kept)
    assert kept == order[: len(kept)]
    fewer = recipe.keeping({name: found.recipe.kept[name] for name in kept[:-1]})
    assert not loss(tiny.tower.features(fewer, tiny.tiles), exact).meets(0.99)


def test_a_budget_out_of_reach_keeps_everything(tiny: Source, tmp_path: Path) -> None:
    report = tiny.write(tmp_path / "vision.onnx", precision="int4", min_cosine=1.0).report
    assert set(report.kept) == set(tiny.tower.products)
    assert report.cosine_mean < report.min_cosine
    assert 0.999 < report.cosine_mean < 1


def test_a_wide_budget_asks_for_no_less_than_any_cosine() -> None:
    assert Loss.least_worst(0.995) == pytest.approx(0.98)
    assert Loss.least_worst(0.001) == -1


WEIGHTS = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 70)),
    elements=st.floats(-100, 100, width=32),
)


@settings(deadline=None)
@given(WEIGHTS)
def test_int8_is_never_off_by_more_than_half_a_step(weight: Floats) -> None:
    values, scale = integers.int8_channels(weight)
    assert np.abs(values.astype(int)).max() <= 127
    assert (np.abs(values * scale[:, None] - weight) <= scale[:, None] * 0.501).all()
    assert np.isfinite(scale).all()
    blocks, scales = integers.int8_blocks(weight, 16)
    flat = (blocks * scales[..., None]).reshape(len(weight), -1)[:, : weight.shape[1]]
    assert (np.abs(flat - weight) <= np.repeat(scales, 16, 1)[:, : weight.shape[1]] * 0.501).all()


@settings(deadline=None)
@given(WEIGHTS)
def test_the_searched_scale_of_int4_is_no_worse_than_the_plain_one(weight: Floats) -> None:
    values, scales = integers.int4_blocks(weight, 16)
    assert values.min() >= -8
    assert values.max() <= 7
    blocks = np.pad(weight, ((0, 0), (0, -weight.shape[1] % 16))).reshape(len(weight), -1, 16)
    found = np.square(values * scales[..., None] - blocks).sum(axis=2)
    plain_scale = np.abs(blocks).max(axis=2, keepdims=True) / 7
    plain_scale = np.where(plain_scale < 1e-30, 1, plain_scale)
    plain = np.rint(blocks / plain_scale) * plain_scale
    plain_error = np.square(plain - blocks).sum(axis=2)
    assert (found <= plain_error * 1.001 + 1e-6 * np.abs(weight).max() ** 2 + 1e-37).all()


@settings(deadline=None)
@given(arrays(np.int8, (3, 8), elements=st.integers(-8, 7)))
def test_packed_nibbles_read_back(values: npt.NDArray[np.int8]) -> None:
    packed = integers.pack_nibbles(values.reshape(-1))
    tensor = onnx.TensorProto(
        data_type=onnx.TensorProto.INT4, dims=values.shape, raw_data=packed.tobytes()
    )
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), values)


@settings(deadline=None)
@given(st.floats(-50, 0), st.floats(0, 50))
def test_zero_is_exact_in_every_range(low: float, high: float) -> None:
    limits = Range(low, high)
    x = np.array([low, 0, high], np.float32)
    for signed in (False, True):
        found = round_to(x, limits, signed)
        assert found[1] == 0
        step = float((limits.signed() if signed else limits.unsigned())[0])
        assert np.abs(found - x).max() <= step * 0.51 + 1e-6


def test_a_rare_outlier_is_cut_off() -> None:
    inputs = Inputs(1)
    x = np.random.default_rng(0).standard_normal((128, 512)).astype(np.float32)
    x[3, 5] = 12
    inputs.add(x)
    assert input_range(inputs, None).high == 12
    clipped = clipped_range(inputs, None, signed=False)
    assert clipped.high < 12
    plain = np.square(round_to(x, input_range(inputs, None)) - x).sum()
    assert np.square(round_to(x, clipped) - x).sum() < plain


def test_tiles_take_turns_among_pictures_and_skip_black_ones(tiny: Source) -> None:
    images = tiny.settings.image_processor
    side = images.base_input_size[0] * 2
    grey = [np.full((side, side, 3), level, np.uint8) for level in (255, 128)]
    black = np.zeros((side, side, 3), np.uint8)
    tiles = cut_pictures([black, *grey], tiny.model, 4)
    assert [round(float(crop.mean())) for crop in tiles.crops] == [1, 0, 1, 0]
    with pytest.raises(InputError, match="black"):
        cut_pictures([black], tiny.model, 4)


def test_tiles_come_from_a_folder(tiny: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        calibration_tiles(tmp_path / "absent", tiny.model, 4)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(InputError, match="no pictures"):
        calibration_tiles(tmp_path, tiny.model, 4)
    Image.new("RGB", (200, 100), "white").save(tmp_path / "white.png")
    assert (calibration_tiles(tmp_path, tiny.model, 1).crops == 1).all()


def test_drawn_tiles_are_always_the_same(tiny: Source) -> None:
    again = calibration_tiles("builtin", tiny.model, 3)
    assert np.array_equal(again.crops, tiny.tiles.crops)
    assert all(crop.std() > 0.1 for crop in again.crops)
