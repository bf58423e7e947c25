"""LLaVA-1.5 and LLaVA-NeXT from pixels to rows: sizes, crops and blocks are the published ones."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_vlm.errors import ImageError
from edge_vlm.families.llava import crop
from edge_vlm.families.llava.llava_15 import FAMILY as LLAVA_15
from edge_vlm.families.llava.llava_next import FAMILY as LLAVA_NEXT
from edge_vlm.families.llava.released import IMAGE_PROCESSOR, NEXT_IMAGE_PROCESSOR
from edge_vlm.families.llava_like import cut_grid
from edge_vlm.families.resample import resize_bicubic_part
from edge_vlm.pictures.image import load_image
from edge_vlm.pictures.overview import draw_tiling
from edge_vlm.planning.models import model_sizes
from edge_vlm.planning.request import plan_image, plan_request
from tests.conftest import GOLDEN, GoldenCase, examples, load_golden

UInt8 = npt.NDArray[np.uint8]
FAMILIES = {
    "llava-1.5": (LLAVA_15, IMAGE_PROCESSOR),
    "llava-next": (LLAVA_NEXT, NEXT_IMAGE_PROCESSOR),
}
TABLES = {
    name: json.loads((GOLDEN / name / "size_table.json").read_text(encoding="utf-8"))
    for name in FAMILIES
}
SIDE = 336
SHAPES = ((300, 200), (20, 900), (1100, 808), (1344, 1344), (7000, 20), (1, 5000), (1, 1))


def rows_of(name: str) -> list[Any]:
    """The sizes of a table."""
    return [
        pytest.param(row, id=f"{row['width']}x{row['height']}") for row in TABLES[name]["sizes"]
    ]


def pictures() -> list[Any]:
    """Each picture of each case, and its number there."""
    return [
        pytest.param(case, index, id=f"{case}-{index}")
        for name in FAMILIES
        for case in load_golden(name).cases.values()
        for index in range(len(case.images))
    ]


def noise(height: int, width: int) -> UInt8:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("row", rows_of("llava-1.5"))
def test_size_table_of_llava_15(row: dict[str, Any]) -> None:
    plan = LLAVA_15.layout(row["width"], row["height"], IMAGE_PROCESSOR)
    assert row == {
        "width": plan.original_hw[1],
        "height": plan.original_hw[0],
        "resized_hw": list(plan.resized_hw),
        "crop_top_left": list(crop.corner(plan, IMAGE_PROCESSOR)),
        "n_crops": plan.n_crops,
        "n_image_tokens": plan.n_tokens,
    }


@pytest.mark.parametrize("row", rows_of("llava-next"))
def test_size_table_of_llava_next(row: dict[str, Any]) -> None:
    plan = LLAVA_NEXT.layout(row["width"], row["height"], NEXT_IMAGE_PROCESSOR)
    whole = [n * SIDE for n in plan.tiling]
    margins = [(full - used) // 2 for full, used in zip(whole, plan.resized_hw, strict=True)]
    assert plan.grid_hw == plan.kept_hw
    assert row == {
        "width": plan.original_hw[1],
        "height": plan.original_hw[0],
        "best_hw": whole,
        "tiling": list(plan.tiling),
        "resized_hw": list(plan.resized_hw),
        "pad_top_left": margins,
        "n_crops": plan.n_crops,
        "feature_rows": plan.grid_hw[0],
        "feature_cols": plan.grid_hw[1] if plan.grid_hw[0] else 0,  # of no rows
        "n_image_tokens": plan.n_tokens,
    }


def test_the_released_settings_are_those_of_the_tables() -> None:
    for name, (_, processor) in FAMILIES.items():
        told = TABLES[name]["settings"]
        assert (told["crop_size"], told["patch_size"]) == (
            processor.tile_size,
            processor.patch_size,
        )
        assert processor.image_mean[0] == 0.48145466
        assert processor.tokens_per_crop == 576
    assert TABLES["llava-1.5"]["settings"]["size"] == {"shortest_edge": SIDE}
    assert [[rows * SIDE, columns * SIDE] for rows, columns in NEXT_IMAGE_PROCESSOR.grids] == (
        TABLES["llava-next"]["settings"]["image_grid_pinpoints"]
    )
    assert NEXT_IMAGE_PROCESSOR.max_tiles == 4


@pytest.mark.parametrize(("case", "index"), pictures())
def test_pixels_equal_the_published_ones(case: GoldenCase, index: int) -> None:
    golden, expected = case.arrays, case.data["per_image"][index]
    family, processor = FAMILIES[case.model]
    pixels = load_image(case.images[index], alpha="drop")
    plan = family.layout(expected["width"], expected["height"], processor)
    cut = crop.cut_level if case.model == "llava-1.5" else cut_grid
    levels = cut(pixels, plan, processor)
    np.testing.assert_array_equal(
        levels.sum(axis=(1, 2), dtype=np.int64), golden[f"img{index}_crops_u8_sum"]
    )
    crops = family.cut(pixels, processor).crops
    assert crops.shape == (expected["n_crops"], 576, 3 * 14 * 14)
    seen = crops.reshape(-1, 24, 24, 3, 14, 14).transpose(0, 3, 1, 4, 2, 5)
    seen = seen.reshape(len(crops), 3, SIDE, SIDE)
    np.testing.assert_array_equal(
        seen[:, :, [0, SIDE // 2, SIDE - 1]], golden[f"img{index}_crops_rows"]
    )
    values = seen.astype(np.float64)
    np.testing.assert_allclose(
        values.sum(axis=(1, 2, 3)), golden[f"img{index}_crops_sum"], rtol=1e-12, atol=1e-7
    )
    np.testing.assert_allclose(
        np.square(values).sum(axis=(1, 2, 3)), golden[f"img{index}_crops_sumsq"], rtol=1e-12
    )


@pytest.mark.parametrize(("case", "index"), pictures())
def test_layouts_equal_the_published_ones(case: GoldenCase, index: int) -> None:
    golden = case.data["per_image"][index]
    family, processor = FAMILIES[case.model]
    plan = family.layout(golden["width"], golden["height"], processor)
    assert (plan.n_tokens, plan.n_crops) == (golden["n_image_tokens"], golden["n_crops"])
    assert list(plan.resized_hw) == golden["resized_hw"]
    if case.model == "llava-next":
        assert list(plan.tiling) == golden["tiling"]
        assert list(plan.kept_hw) == golden["unpadded_hw"]
        assert list(crop_of(plan)) == golden["tiled_hw"]


def crop_of(plan: Any) -> tuple[int, int]:
    """Pixels of the chosen resolution."""
    return plan.tiling[0] * SIDE, plan.tiling[1] * SIDE


@settings(max_examples=examples(60, 600), deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 400), st.booleans())
def test_a_part_of_a_resize_is_that_of_the_whole(height: int, width: int, hard: bool) -> None:
    """Pillow resizes the whole; also where its sums leave what 8 bits can hold."""
    pixels = noise(height, width)
    if hard:
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    plan = LLAVA_15.layout(width, height, IMAGE_PROCESSOR)
    top, left = crop.corner(plan, IMAGE_PROCESSOR)
    target = plan.resized_hw
    if target[0] * target[1] > 1 << 24:
        return
    whole = Image.fromarray(pixels).resize(target[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(
        resize_bicubic_part(pixels, target, (top, left), (SIDE, SIDE)),
        np.asarray(whole)[top : top + SIDE, left : left + SIDE],
    )


@pytest.mark.limits
def test_long_pictures_take_little_memory() -> None:
    """The last would be resized to 336 x 22 million pixels."""
    code = """
import numpy as np
from edge_vlm.families.llava.llava_15 import FAMILY as ONE
from edge_vlm.families.llava.llava_next import FAMILY as NEXT
from edge_vlm.families.llava.released import IMAGE_PROCESSOR, NEXT_IMAGE_PROCESSOR
from edge_vlm.machine.memory import peak_rss_bytes
pixels = np.full((30, 60_000, 3), 200, np.uint8)
for picture in (pixels, pixels.swapaxes(0, 1), pixels[:1], pixels[:1].swapaxes(0, 1)):
    ONE.cut(picture, IMAGE_PROCESSOR)
    NEXT.cut(picture, NEXT_IMAGE_PROCESSOR)
print(peak_rss_bytes())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert int(run.stdout) < 500_000_000


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_rows_are_the_overview_and_a_grid_with_newlines(width: int, height: int) -> None:
    """Against the same thing written with loops."""
    hidden, processor = 5, NEXT_IMAGE_PROCESSOR
    plan = LLAVA_NEXT.layout(width, height, processor)
    shape = (plan.n_crops, processor.tokens_per_crop, hidden)
    embeddings = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    newline = np.full((1, hidden), 7, np.float32)
    expected = [*embeddings[0]]
    for row in range(plan.kept_hw[0]):
        for column in range(plan.kept_hw[1]):
            tile_row, y = divmod(plan.padding_hw[0] + row, 24)
            tile_column, x = divmod(plan.padding_hw[1] + column, 24)
            tile = embeddings[1 + tile_row * plan.tiling[1] + tile_column]
            expected.append(tile[y * 24 + x])
        expected.append(newline[0])
    np.testing.assert_array_equal(LLAVA_NEXT.rows(embeddings, newline, plan, processor), expected)


def test_rows_of_one_crop_are_its_vectors() -> None:
    plan = LLAVA_15.layout(100, 50, IMAGE_PROCESSOR)
    embeddings = np.random.default_rng(0).standard_normal((1, 576, 4)).astype(np.float32)
    none = np.empty((0, 4), np.float32)
    rows = LLAVA_15.rows(embeddings, none, plan, IMAGE_PROCESSOR)
    np.testing.assert_array_equal(rows, embeddings[0])


@pytest.mark.parametrize("max_tiles", [1, 2, 3, 4, 100])
def test_fewer_tiles(max_tiles: int) -> None:
    limited = LLAVA_NEXT.limited(NEXT_IMAGE_PROCESSOR, max_tiles)
    assert limited.max_tiles == min(max(max_tiles, 2), 4)  # no resolution has one tile
    for width, height in SHAPES:
        assert LLAVA_NEXT.layout(width, height, limited).n_crops <= 1 + limited.max_tiles
    assert (limited == NEXT_IMAGE_PROCESSOR) == (max_tiles >= 4)
    assert LLAVA_15.limited(IMAGE_PROCESSOR, max_tiles) == IMAGE_PROCESSOR


def test_a_second_picture_changes_nothing() -> None:
    for family, processor in FAMILIES.values():
        assert family.beside(processor, 2) == processor


def test_a_side_may_be_too_long() -> None:
    for family, processor in FAMILIES.values():
        with pytest.raises(ImageError, match="70000x1 pixels: one side is longer than 65535"):
            family.layout(70_000, 1, processor)
        with pytest.raises(ImageError, match="make it smaller or crop it"):
            family.cut(np.zeros((70_000, 1, 3), np.uint8), processor)


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_boxes_are_what_is_seen(width: int, height: int) -> None:
    plan = LLAVA_NEXT.layout(width, height, NEXT_IMAGE_PROCESSOR)
    boxes = list(LLAVA_NEXT.boxes(plan, NEXT_IMAGE_PROCESSOR))
    assert sum(count for _, _, count in boxes) == plan.tile_tokens
    area = sum((right - left) * (low - top) for _, (left, top, right, low), _ in boxes)
    assert area == pytest.approx(1 if plan.tile_tokens else 0)

    one = LLAVA_15.layout(width, height, IMAGE_PROCESSOR)
    ((extent, used, count),) = LLAVA_15.boxes(one, IMAGE_PROCESSOR)
    assert extent == used
    assert count == 576
    left, top, right, low = used
    assert (right - left) * (low - top) == pytest.approx(
        min(width, height) / max(width, height), rel=0.01
    )
    assert one.is_reduced == (width != height or width > SIDE)


def test_an_overview_is_drawn_for_any_shape() -> None:
    for width, height in SHAPES:
        for _, processor in FAMILIES.values():
            sheet = draw_tiling(np.full((height, width, 3), 90, np.uint8), processor)
            assert sheet.width > 300


def test_the_largest_pictures_are_the_largest() -> None:
    rng = np.random.default_rng(0)
    for max_tiles in (2, 3, 4):
        for family, released in FAMILIES.values():
            processor: Any = family.limited(released, max_tiles)
            plans = [family.layout(*size, processor) for size in family.largest(processor)]
            for width, height in rng.integers(1, 2600, (300, 2)).tolist():
                found = family.layout(width, height, processor)
                assert found.n_tokens <= max(plan.n_tokens for plan in plans)
                assert found.n_crops <= max(plan.n_crops for plan in plans)


def test_the_planner_counts_the_same() -> None:
    known = {
        "llava-1.5-7b": ("llava-1.5", 6.74e9),
        "llava-1.5-13b": ("llava-1.5", 13.0e9),
        "llava-next-mistral-7b": ("llava-next", 7.24e9),
        "llava-next-vicuna-7b": ("llava-next", 6.74e9),
    }
    for name, (family, parameters) in known.items():
        model = model_sizes("fp16", "f16", name=name)
        for row in TABLES[family]["sizes"]:
            plan = plan_image(row["width"], row["height"], model.processor, model.decoder)
            assert (plan.image_tokens, plan.crops) == (row["n_image_tokens"], row["n_crops"])
        # Known numbers: 0.3 billion parameters see, less the last of 24 blocks.
        assert model.decoder_bytes == pytest.approx(2 * parameters, rel=0.01)
        n_projector = (1024 + model.decoder.hidden_size) * model.decoder.hidden_size
        assert model.vision_bytes == pytest.approx(2 * (0.291e9 + n_projector), rel=0.01)
    request = plan_request(model_sizes(name="llava-next-mistral-7b"), 1100, 808)
    assert request.prompt_tokens == 2340 + 32
    assert request.flops.vision == 5 * model_sizes(name="llava-next-mistral-7b").work.tower_flops
