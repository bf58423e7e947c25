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
from PIL import Image

from edge_vlm.bundle import Bundle
from edge_vlm.tiling import Tiles, cut_tiles
from tests.conftest import GoldenCase, golden_cases

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


def run(session: onnxruntime.InferenceSession, tiles: Tiles) -> Arrays:
    """All outputs, one crop at a time to bound memory; batches are compared elsewhere."""
    names = [output.name for output in session.get_outputs()]
    parts = [
        session.run(names, {"crops": tiles.crops[i : i + 1], "is_last": tiles.is_last[i : i + 1]})
        for i in range(len(tiles.crops))
    ]
    return {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(names)}


def tiles_of(case: GoldenCase, folder: Path, index: int = 0) -> Tiles:
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
