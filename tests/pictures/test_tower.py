"""The vision tower in onnxruntime, with a toy graph whose numbers are known."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge_vlm import BundleError, Cancelled, CancelToken, VisionError
from edge_vlm.bundle.manifest import VISION_NAME, Bundle
from edge_vlm.families.jina_vlm.tiling import JinaTiles, cut_tiles
from edge_vlm.machine.engine_settings import EngineSettings, untuned
from edge_vlm.pictures.tower import OnnxTower
from tests.bundle.damage import record
from tests.fake_engine import FakeTower
from tests.toy import tower as toy
from tests.toy.bundle import VISION_FILE, write_toy_bundle
from tests.toy.make_vision import vision_graph
from tests.toy.sizes import HIDDEN, N_MARKERS, PROCESSOR

ONE_THREAD = replace(untuned(), vision_threads=1, vision_streams=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "toy")


@pytest.fixture
def load(folder: Path) -> Callable[..., OnnxTower]:
    def loaded(engines: EngineSettings = ONE_THREAD, **options: Any) -> OnnxTower:
        return OnnxTower(Bundle.open(folder), engines, **options)

    return loaded


@pytest.fixture
def tiles() -> JinaTiles:
    """Of seven crops."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    return cut_tiles(pixels, PROCESSOR)


def test_the_graph_is_what_its_generator_writes() -> None:
    """Its nodes and weights to the last bit."""
    assert onnx.load(VISION_FILE).graph == vision_graph().graph
    assert VISION_FILE.stat().st_size < 4096


def test_onnxruntime_computes_what_numpy_does(
    load: Callable[..., OnnxTower], tiles: JinaTiles
) -> None:
    tower, fake = load(), FakeTower()
    expected = toy.embed(tiles.crops, tiles.is_last)
    np.testing.assert_allclose(tower.encode(tiles), expected, atol=1e-6)
    np.testing.assert_allclose(tower.marker_embeddings, toy.MARKERS, atol=0)
    for part, rows in fake.encode_parts(tiles.feed):
        assert np.array_equal(rows, expected[part])
    assert tower.output_shape == fake.output_shape == expected.shape[1:]
    assert tower.n_markers == fake.n_markers == N_MARKERS
    assert tower.marker_embeddings.shape == (N_MARKERS, HIDDEN)


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("tiles_per_call", [1, 2, 4])
@pytest.mark.parametrize("wanted", [[], [3], [6, 0], [0, 1, 2, 3, 4, 5, 6]])
def test_parts_hold_what_is_wanted(
    load: Callable[..., OnnxTower],
    tiles: JinaTiles,
    streams: int,
    tiles_per_call: int,
    wanted: list[int],
) -> None:
    engines = replace(
        untuned(), vision_threads=3, vision_streams=streams, tiles_per_call=tiles_per_call
    )
    tower = load(engines)
    assert tower.crops_at_once == streams * tiles_per_call
    expected = toy.embed(tiles.crops, tiles.is_last)
    found: list[int] = []
    for part, rows in tower.encode_parts(tiles.feed, wanted):
        assert len(part) <= tiles_per_call
        np.testing.assert_allclose(rows, expected[part], atol=1e-6)
        found += part
    assert sorted(found) == sorted(wanted)
    assert tower.is_loaded is bool(wanted)


def test_loading_makes_room_first_and_is_done_once(load: Callable[..., OnnxTower]) -> None:
    asked: list[bool] = []
    tower = load(before_load=lambda: asked.append(tower.is_loaded))
    assert (tower.is_loaded, tower.load_seconds) == (False, 0.0)
    tower.rest()
    assert not asked
    threads = [threading.Thread(target=tower.load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (asked, tower.is_loaded) == ([False], True)
    seconds = tower.load_seconds
    assert seconds > 0
    tower.rest()
    assert tower.is_loaded
    tower.release()
    assert not tower.is_loaded
    assert tower.load() is not None
    assert (len(asked), tower.load_seconds > seconds) == (2, True)


def test_an_identity_holds_what_the_numbers_depend_on(load: Callable[..., OnnxTower]) -> None:
    here = load().identity
    assert here == load().identity
    assert list(here["files"]) == [VISION_NAME]  # the decoder may be another
    for engines in (
        replace(ONE_THREAD, vision_threads=2),
        replace(ONE_THREAD, tiles_per_call=2),
    ):
        assert load(engines).identity != here
    assert load(replace(ONE_THREAD, threads=9, batch_size=64)).identity == here


def one_crop_a_call(folder: Path) -> None:
    made = onnx.load(folder / VISION_NAME)
    for value in (*made.graph.input, made.graph.output[0]):
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(made, folder / VISION_NAME)
    record(folder, VISION_NAME)


def test_a_graph_for_exactly_one_crop(
    folder: Path, load: Callable[..., OnnxTower], tiles: JinaTiles
) -> None:
    """Some accelerators want fixed shapes."""
    one_crop_a_call(folder)
    tower = load(replace(ONE_THREAD, tiles_per_call=3))
    expected = toy.embed(tiles.crops, tiles.is_last)
    np.testing.assert_allclose(tower.encode(tiles), expected, atol=1e-6)
    np.testing.assert_allclose(tower.marker_embeddings, toy.MARKERS, atol=0)
    tower.rest()


def test_a_graph_for_two_crops_is_refused(folder: Path, load: Callable[..., OnnxTower]) -> None:
    made = onnx.load(folder / VISION_NAME)
    for value in (*made.graph.input, made.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(made, folder / VISION_NAME)
    record(folder, VISION_NAME)
    with pytest.raises(BundleError, match="takes 2 crops at a time instead of one"):
        load().load()


def test_progress_and_cancelling(load: Callable[..., OnnxTower], tiles: JinaTiles) -> None:
    tower, done, cancel = load(), [], CancelToken()

    def stop_after_three(n_crops: int) -> None:
        done.append(n_crops)
        if n_crops == 3:
            cancel.set()

    with pytest.raises(Cancelled):
        tower.encode(tiles, cancel=cancel, progress=stop_after_three)
    assert done == [1, 2, 3]
    done.clear()
    tower.encode(tiles, progress=done.append)
    assert done == list(range(1, 8))


def test_stopping_inside_a_crop_is_no_failure(
    load: Callable[..., OnnxTower], tiles: JinaTiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime ends such a run with an error of its own."""
    tower, cancel = load(), CancelToken()

    def run(_session: Any, _outputs: Any, _feed: Any, options: Any) -> Any:
        assert not options.terminate
        cancel.set()
        assert options.terminate
        raise RuntimeError("Exiting due to terminate flag being set to true.")

    monkeypatch.setattr("onnxruntime.InferenceSession.run", run)
    with pytest.raises(Cancelled, match="while encoding the picture"):
        tower.encode(tiles, cancel=cancel)


def test_a_failure_is_one_line(
    load: Callable[..., OnnxTower], tiles: JinaTiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> Any:
        raise RuntimeError("\nno memory\nat all")

    tower = load()
    monkeypatch.setattr("onnxruntime.InferenceSession.run", run)
    with pytest.raises(VisionError, match=r"^onnxruntime failed: no memory$"):
        tower.encode(tiles)


def test_embeddings_own_their_memory(load: Callable[..., OnnxTower], tiles: JinaTiles) -> None:
    """Views would keep onnxruntime's arena."""
    assert load().encode_crops(tiles.feed).flags.owndata


def test_a_file_that_was_replaced_since_it_was_verified(
    folder: Path, load: Callable[..., OnnxTower]
) -> None:
    tower = load()
    path = folder / VISION_NAME
    os.utime(path, ns=(1, 1))
    with pytest.raises(BundleError, match="was changed after it was loaded"):
        tower.load()
