"""Qwen2.5-VL from pixels to patches: size, values, windows and positions are the published."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import BudgetError, ImageError
from edge_vlm.families.base import find_family
from edge_vlm.families.qwen2_5_vl import patches
from edge_vlm.families.qwen2_5_vl.family import FAMILY
from edge_vlm.families.qwen2_5_vl.released import IMAGE_PROCESSOR
from edge_vlm.pictures.image import load_image
from edge_vlm.pictures.overview import draw_tiling
from edge_vlm.planning.budget import check_budget, limit_tiles
from edge_vlm.planning.models import model_sizes
from edge_vlm.planning.profiles import PROFILES
from edge_vlm.planning.request import plan_image, plan_request
from tests.conftest import GOLDEN, GoldenCase, load_golden

TABLE = json.loads((GOLDEN / "qwen2.5-vl/size_table.json").read_text(encoding="utf-8"))
SIZES = [row for row in TABLE["sizes"] if "error" not in row]
REFUSED = [row for row in TABLE["sizes"] if "error" in row]
SHAPES = ((300, 200), (20, 900), (901, 205), (2728, 2046), (7000, 90), (1, 150), (1, 1))


def pictures() -> list[Any]:
    """Each picture of each case, and its number there."""
    return [
        pytest.param(case, index, id=f"{case.name}-{index}")
        for case in load_golden("qwen2.5-vl").cases.values()
        for index in range(len(case.images))
    ]


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"{row['width']}x{row['height']}")
def test_size_table(row: dict[str, Any]) -> None:
    plan = FAMILY.layout(row["width"], row["height"], IMAGE_PROCESSOR)
    positions = FAMILY.positions(plan, IMAGE_PROCESSOR)
    assert row == {
        "width": plan.original_hw[1],
        "height": plan.original_hw[0],
        "resized_height": plan.resized_hw[0],
        "resized_width": plan.resized_hw[1],
        "grid_thw": [1, *(2 * n for n in plan.tiling)],
        "n_image_tokens": plan.n_tokens,
        "n_block_tokens": plan.n_tokens + 2,
        "positions_taken": int(positions.max()) + 1,
    }
    assert plan.n_crops == 1


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row['width']}x{row['height']}")
def test_what_the_published_code_refuses(row: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match="more than 200 times as long as the other; crop it"):
        FAMILY.layout(row["width"], row["height"], IMAGE_PROCESSOR)


def test_the_released_settings_are_those_of_the_table() -> None:
    for key, value in TABLE["settings"].items():
        assert getattr(IMAGE_PROCESSOR, key) == value


@pytest.mark.parametrize(("case", "index"), pictures())
def test_pixels_equal_the_published_ones(case: GoldenCase, index: int) -> None:
    golden = case.arrays
    pixels = load_image(case.images[index], alpha="drop")
    tiles = FAMILY.cut(pixels, IMAGE_PROCESSOR)
    n_patches = golden[f"img{index}_pixels_shape"][0]
    assert tiles.crops.shape == (1, n_patches, 588)
    values = tiles.crops[0].reshape(-1, 3, 196)
    # Published, a patch has two frames, which are equal.
    rows = golden[f"img{index}_pixels_rows"].reshape(-1, 3, 2, 196)
    for frame in (0, 1):
        np.testing.assert_array_equal(
            values[golden[f"img{index}_pixels_row_index"]], rows[:, :, frame]
        )
    exact = values.astype(np.float64)
    np.testing.assert_allclose(
        2 * exact.sum(axis=(0, 2)), golden[f"img{index}_pixels_sum"], rtol=1e-12
    )
    np.testing.assert_allclose(
        2 * np.square(exact).sum(axis=(0, 2)), golden[f"img{index}_pixels_sumsq"], rtol=1e-12
    )
    # Every 8-bit level, found again from the values.
    tables = patches.normalised_levels(IMAGE_PROCESSOR)
    levels = [np.searchsorted(tables[channel], values[:, channel]) for channel in range(3)]
    for channel, found in enumerate(levels):
        np.testing.assert_array_equal(tables[channel][found], values[:, channel])
    sums = [2 * int(found.sum()) for found in levels]
    assert sums == golden[f"img{index}_grey_sum"].tolist()


@pytest.mark.parametrize(("case", "index"), pictures())
def test_windows_and_positions_equal_the_published_ones(case: GoldenCase, index: int) -> None:
    golden, expected = case.arrays, case.data["per_image"][index]
    tiles = FAMILY.cut(load_image(case.images[index], alpha="drop"), IMAGE_PROCESSOR)
    assert list(tiles.plan.tiling) == expected["tiling"]
    np.testing.assert_array_equal(tiles.extras["places"][0].T, golden[f"img{index}_patch_hw"])
    (windows,) = tiles.extras["windows"]
    (filled,) = tiles.extras["filled"]
    ends = np.cumsum(filled.sum(axis=1))
    assert [0, *ends] == golden[f"img{index}_cu_window_seqlens"].tolist()
    blocks = windows[filled].reshape(-1, 4)[:, 0] // 4
    np.testing.assert_array_equal(blocks, golden[f"img{index}_window_index"])
    (slots,) = tiles.extras["slots"]
    np.testing.assert_array_equal(windows.ravel()[slots], np.arange(len(slots)))
    positions = FAMILY.positions(tiles.plan, IMAGE_PROCESSOR)
    block = case.arrays["image_positions"]
    before = sum(one["n_image_tokens"] for one in case.data["per_image"][:index])
    published = case.arrays["position_ids"][:, block[before : before + len(positions)]].T
    np.testing.assert_array_equal(positions + published[0, 0], published)
    assert positions.max() + 1 == expected["positions_taken"]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_the_arrangement_is_that_of_loops(width: int, height: int) -> None:
    plan = FAMILY.layout(width, height, IMAGE_PROCESSOR)
    found = patches.arrangement(plan.tiling, IMAGE_PROCESSOR)
    rows, columns = plan.tiling
    seen: dict[tuple[int, int], list[int]] = {}
    patch = 0
    for row in range(rows):
        for column in range(columns):
            for dy in (0, 1):
                for dx in (0, 1):
                    assert found["places"][0, patch].tolist() == [2 * row + dy, 2 * column + dx]
                    seen.setdefault((row // 4, column // 4), []).append(patch)
                    patch += 1
    windows = [
        window[filled].tolist()
        for window, filled in zip(found["windows"][0], found["filled"][0], strict=True)
    ]
    assert windows == [seen[key] for key in sorted(seen)]


@pytest.mark.parametrize("max_tiles", [1, 2, 5, 63, 64, 100])
def test_fewer_pixels(max_tiles: int) -> None:
    """What counts as a tile is 448 x 448 pixels, 256 tokens, wherever they lie."""
    limited = limit_tiles(IMAGE_PROCESSOR, max_tiles)
    assert limited.max_tiles == min(max_tiles, 64)
    for width, height in (*SHAPES, *FAMILY.largest(limited), (9000, 9000), (20_000, 100)):
        plan = FAMILY.layout(width, height, limited)
        assert plan.n_tokens <= 256 * max_tiles
        assert plan.is_reduced or plan.n_tokens * 28**2 >= width * height * 0.7
    if max_tiles >= 64:
        assert limited == IMAGE_PROCESSOR
    assert FAMILY.limited(IMAGE_PROCESSOR.model_copy(update={"min_pixels": 10**6}), 1).max_pixels


def test_the_largest_pictures_are_the_largest() -> None:
    rng = np.random.default_rng(0)
    for max_tiles in (1, 2, 7, 64):
        processor = limit_tiles(IMAGE_PROCESSOR, max_tiles)
        (size,) = FAMILY.largest(processor)
        most = FAMILY.layout(*size, processor).n_tokens
        assert most == 256 * max_tiles
        for width, height in rng.integers(100, 6000, (300, 2)).tolist():
            assert FAMILY.layout(width, height, processor).n_tokens <= most


def test_the_planner_counts_the_same() -> None:
    for name, hidden in (("qwen2.5-vl-3b", 2048), ("qwen2.5-vl-7b", 3584)):
        model = model_sizes(name=name)
        assert model.decoder.hidden_size == hidden
        for row in SIZES:
            plan = plan_image(row["width"], row["height"], model.processor, model.decoder)
            assert (plan.image_tokens, plan.crops) == (row["n_image_tokens"], 1)
    # Known numbers of the released models: 0.67 billion parameters see, 3.1 and 7.6 speak.
    small = model_sizes("fp16", "f16", name="qwen2.5-vl-3b")
    assert small.vision_bytes == pytest.approx(2 * 0.668e9, rel=0.01)
    assert small.decoder_bytes == pytest.approx(2 * 3.09e9, rel=0.01)
    large = model_sizes("fp16", "f16", name="qwen2.5-vl-7b")
    assert large.decoder_bytes == pytest.approx(2 * 7.62e9, rel=0.01)


def test_work_and_memory_follow_the_size_of_a_picture() -> None:
    model = model_sizes(name="qwen2.5-vl-3b")
    speeds = PROFILES["laptop-4core"].speeds(model)
    plans = [plan_request(model, n * 448, 448, speeds=speeds) for n in (1, 2, 4)]
    one, two, four = plans
    assert one.flops.vision == model.work.tower_flops
    assert one.seconds
    assert two.seconds
    assert one.seconds.vision == pytest.approx(speeds.vision_seconds_per_tile)
    assert 2 < two.seconds.vision / one.seconds.vision < 2.2  # four layers see all of it
    # Four layers' scores grow with the square: exactly the difference to twice the work.
    pairs = 4 * 4 * 1280 * (2 * 1024**2)
    assert two.flops.vision - 2 * one.flops.vision == pairs
    arenas = [plan.memory.onnxruntime_arena for plan in plans]
    assert arenas[2] == pytest.approx(4 * arenas[0], rel=0.01)
    pictures = [plan.memory.picture for plan in plans]
    assert pictures == [n * pictures[0] for n in (1, 2, 4)]
    reduced = plan_request(model, 4 * 448, 448, max_tiles=1)
    assert reduced.image.image_tokens <= 256
    assert reduced.memory.onnxruntime_arena <= one.memory.onnxruntime_arena
    assert four.image.image_tokens == 1024


def test_the_budget_says_what_would_fit() -> None:
    model = model_sizes(name="qwen2.5-vl-3b")
    with pytest.raises(BudgetError, match=r"11 tiles would fit \(--max-tiles 11\)"):
        check_budget(7081 + 64, [(2046, 2728)], model.processor, model.decoder, 110_000_000, "f16")


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_an_overview_is_drawn_for_any_shape(width: int, height: int) -> None:
    pixels = np.full((height, width, 3), 90, np.uint8)
    assert draw_tiling(pixels, IMAGE_PROCESSOR).width > 300
    plan = FAMILY.layout(width, height, IMAGE_PROCESSOR)
    ((extent, used, count),) = FAMILY.boxes(plan, IMAGE_PROCESSOR)
    assert extent == used == (0, 0, 1, 1)
    assert count == plan.tile_tokens == plan.n_tokens


def test_settings_that_cannot_be() -> None:
    for wrong, reason in (
        ({"window_size": 100}, "whole blocks"),
        ({"min_pixels": 10}, "min_pixels"),
        ({"max_pixels": 2000}, "min_pixels"),
    ):
        with pytest.raises(ValueError, match=reason):
            type(IMAGE_PROCESSOR).model_validate({**IMAGE_PROCESSOR.model_dump(), **wrong})
    assert find_family("qwen2.5-vl") is FAMILY
