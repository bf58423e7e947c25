"""LLaVA-OneVision from pixels to rows: sizes, crops and blocks are the published ones."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_vlm.errors import ImageError
from edge_vlm.families.llava_onevision import tiling
from edge_vlm.families.llava_onevision.family import FAMILY
from edge_vlm.families.llava_onevision.released import IMAGE_PROCESSOR
from edge_vlm.families.resample import resize_bicubic
from edge_vlm.pictures.image import load_image
from edge_vlm.pictures.overview import draw_tiling
from edge_vlm.planning.models import model_sizes
from edge_vlm.planning.request import plan_image, plan_request
from tests.conftest import GOLDEN, GoldenCase, load_golden

UInt8 = npt.NDArray[np.uint8]
TABLE = json.loads((GOLDEN / "llava-onevision/size_table.json").read_text(encoding="utf-8"))
ONE_OF_TWO = FAMILY.beside(IMAGE_PROCESSOR, 2)
SHAPES = ((300, 200), (20, 900), (901, 205), (1300, 1003), (2304, 2304), (7000, 20), (1, 5000))


def pictures() -> list[Any]:
    """Each picture of each case, its number there, and the image processor it is for."""
    found = []
    for case in load_golden("llava-onevision").cases.values():
        flat = case.data.get("images_given") == "flat"
        processor = IMAGE_PROCESSOR if flat else FAMILY.beside(IMAGE_PROCESSOR, len(case.images))
        for index in range(len(case.images)):
            found.append(pytest.param(case, index, processor, id=f"{case.name}-{index}"))
    return found


def noise(height: int, width: int) -> UInt8:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("row", TABLE["sizes"], ids=lambda row: f"{row['width']}x{row['height']}")
def test_size_table(row: dict[str, Any]) -> None:
    plan = FAMILY.layout(row["width"], row["height"], IMAGE_PROCESSOR)
    side = IMAGE_PROCESSOR.tile_size
    whole = [n * side for n in plan.tiling]
    margins = [(full - used) // 2 for full, used in zip(whole, plan.resized_hw, strict=True)]
    assert row == {
        "width": plan.original_hw[1],
        "height": plan.original_hw[0],
        "best_hw": whole,
        "tiling": list(plan.tiling),
        "resized_hw": list(plan.resized_hw),
        "pad_top_left": margins,
        "n_crops": plan.n_crops,
        "feature_rows": plan.grid_hw[0],
        "feature_cols": plan.grid_hw[1],
        "n_image_tokens": plan.n_tokens,
    }
    together = FAMILY.layout(row["width"], row["height"], ONE_OF_TWO)
    assert together.n_tokens == TABLE["settings"]["tokens_each_when_several"]
    assert together.n_crops == 1


def test_the_released_settings_are_those_of_the_table() -> None:
    settings = TABLE["settings"]
    side = settings["size"]
    assert [[rows * side, columns * side] for rows, columns in IMAGE_PROCESSOR.grids] == (
        settings["image_grid_pinpoints"]
    )
    assert (side, settings["patch_size"]) == (IMAGE_PROCESSOR.tile_size, IMAGE_PROCESSOR.patch_size)
    assert settings["vision_aspect_ratio"] == f"anyres_max_{IMAGE_PROCESSOR.max_vectors}"
    assert IMAGE_PROCESSOR.max_tiles == 36


@pytest.mark.parametrize(("case", "index", "processor"), pictures())
def test_pixels_equal_the_published_ones(case: GoldenCase, index: int, processor: Any) -> None:
    golden, expected = case.arrays, case.data["per_image"][index]
    pixels = load_image(case.images[index], alpha="drop")
    plan = FAMILY.layout(expected["width"], expected["height"], processor)
    levels = tiling.cut_levels(pixels, plan, processor)
    sums = levels.sum(axis=(1, 2), dtype=np.int64)
    np.testing.assert_array_equal(sums, golden[f"img{index}_crops_u8_sum"])

    crops = FAMILY.cut(pixels, processor).crops
    side, patch = processor.side, processor.patch_size
    assert crops.shape == (expected["n_crops"], side * side, 3 * patch * patch)
    grid = crops.reshape(-1, side, side, 3, patch, patch).transpose(0, 3, 1, 4, 2, 5)
    seen = grid.reshape(len(crops), 3, side * patch, side * patch)
    middle = processor.tile_size // 2  # golden rows are the first, this one and the last
    rows = golden[f"img{index}_crops_rows"][:, :, :2, : side * patch]
    np.testing.assert_array_equal(seen[:, :, [0, middle]], rows)

    # The whole crops, from the 8-bit levels: the last rows and columns are in no patch.
    unit = ((levels * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(
        unit[:, : side * patch, : side * patch].transpose(0, 3, 1, 2), seen
    )
    values = unit.astype(np.float64)
    np.testing.assert_allclose(
        values.sum(axis=(1, 2, 3)), golden[f"img{index}_crops_sum"], rtol=1e-12, atol=1e-7
    )
    np.testing.assert_allclose(
        np.square(values).sum(axis=(1, 2, 3)), golden[f"img{index}_crops_sumsq"], rtol=1e-12
    )
    np.testing.assert_array_equal(
        unit[:, -1].transpose(0, 2, 1), golden[f"img{index}_crops_rows"][:, :, 2]
    )


@pytest.mark.parametrize(("case", "index", "processor"), pictures())
def test_layouts_equal_the_published_ones(case: GoldenCase, index: int, processor: Any) -> None:
    golden = case.data["per_image"][index]
    plan = FAMILY.layout(golden["width"], golden["height"], processor)
    assert plan.n_tokens == golden["n_image_tokens"]
    if golden["tiling"] is None:
        return
    assert list(plan.tiling) == golden["tiling"]
    assert list(plan.resized_hw) == golden["resized_hw"]
    assert list(plan.kept_hw) == golden["unpadded_hw"]
    assert list(plan.grid_hw) == (golden["interpolated_hw"] or golden["unpadded_hw"])


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_rows_are_the_overview_and_a_grid_with_newlines(width: int, height: int) -> None:
    """Against the same thing written with loops, where nothing is scaled down."""
    hidden = 5
    for processor in (IMAGE_PROCESSOR, ONE_OF_TWO):
        plan = FAMILY.layout(width, height, processor)
        shape = (plan.n_crops, processor.tokens_per_crop, hidden)
        embeddings = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        newline = np.full((1, hidden), 7, np.float32)
        rows = FAMILY.rows(embeddings, newline, plan, processor)
        assert rows.shape == (plan.n_tokens, hidden)
        assert (rows == 7).all(axis=1).sum() == (plan.grid_hw[0] if processor.tiled else 1)
        if not processor.tiled:
            np.testing.assert_array_equal(rows, [*embeddings[0], newline[0]])
            continue
        side = processor.side
        np.testing.assert_array_equal(rows[: side * side], embeddings[0])
        lines = rows[side * side :].reshape(plan.grid_hw[0], plan.grid_hw[1] + 1, hidden)
        if plan.grid_hw != plan.kept_hw:
            continue
        top, left = plan.padding_hw
        for row in range(plan.kept_hw[0]):
            for column in range(plan.kept_hw[1]):
                tile_row, y = divmod(top + row, side)
                tile_column, x = divmod(left + column, side)
                tile = embeddings[1 + tile_row * plan.tiling[1] + tile_column]
                np.testing.assert_array_equal(lines[row, column], tile[y * side + x])


def test_a_grid_of_many_vectors_is_scaled_down_smoothly() -> None:
    plan = FAMILY.layout(2304, 2304, IMAGE_PROCESSOR)
    assert (plan.kept_hw, plan.grid_hw) == ((162, 162), (81, 81))
    side = IMAGE_PROCESSOR.side
    ramp = np.arange(162, dtype=np.float32)
    grid = np.stack(np.meshgrid(ramp, ramp, indexing="ij"), axis=-1)  # (row, column) of a vector
    tiles = grid.reshape(6, side, 6, side, 2).swapaxes(1, 2).reshape(36, side * side, 2)
    embeddings = np.concatenate((np.zeros((1, side * side, 2), np.float32), tiles))
    rows = FAMILY.rows(embeddings, np.zeros((1, 2), np.float32), plan, IMAGE_PROCESSOR)
    lines = rows[side * side :].reshape(81, 82, 2)[:, :81]
    centres = np.arange(81) * 2 + 0.5  # the middle of the two vectors that become one
    expected = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1)
    np.testing.assert_array_equal(lines, expected)


@pytest.mark.parametrize("max_tiles", [1, 2, 4, 9, 12, 36, 100])
def test_fewer_tiles(max_tiles: int) -> None:
    limited = FAMILY.limited(IMAGE_PROCESSOR, max_tiles)
    assert limited.max_tiles == min(max_tiles, 36)
    for width, height in SHAPES:
        assert FAMILY.layout(width, height, limited).n_crops <= 1 + max_tiles
    if max_tiles == 36:
        assert limited == IMAGE_PROCESSOR


def test_no_resolution_is_small_enough() -> None:
    large = IMAGE_PROCESSOR.model_copy(update={"grids": ((2, 2), (1, 2), (2, 1))})
    assert FAMILY.limited(large, 1).grids == ((1, 2), (2, 1))


@pytest.mark.parametrize(
    ("height", "width"), [(40, 700), (700, 40), (384, 384), (385, 384), (1, 50), (3, 1)]
)
def test_a_padded_square_is_resized_as_a_whole(height: int, width: int) -> None:
    """The square is never made, and yet every bit is that of one that was."""
    pixels = noise(height, width)
    longest = max(height, width)
    square = np.full((longest, longest, 3), 127, np.uint8)
    top, left = (longest - height) // 2, (longest - width) // 2
    square[top : top + height, left : left + width] = pixels
    expected = Image.fromarray(square).resize((384, 384), Image.Resampling.BICUBIC)
    plan = FAMILY.layout(width, height, ONE_OF_TWO)
    np.testing.assert_array_equal(tiling.cut_levels(pixels, plan, ONE_OF_TWO)[0], expected)


@pytest.mark.parametrize(
    ("source", "target", "vertical_first"),
    [
        ((901, 205), (384, 384), True),
        ((205, 901), (384, 384), False),
        ((300, 300), (100, 250), True),
        ((300, 300), (200, 250), False),
        ((300, 300), (199, 250), True),
        ((50, 60), (100, 120), False),
        ((50, 60), (50, 120), False),
    ],
)
def test_the_order_of_a_resize(
    source: tuple[int, int], target: tuple[int, int], vertical_first: bool
) -> None:
    """It decides the last bit, and is the same whichever Pillow is installed."""
    image = Image.fromarray(noise(*source))
    (_, width), (new_height, new_width) = source, target
    middle = (width, new_height) if vertical_first else (new_width, source[0])
    bicubic = Image.Resampling.BICUBIC
    expected = image.resize(middle, bicubic).resize((new_width, new_height), bicubic)
    np.testing.assert_array_equal(resize_bicubic(np.asarray(image), *target), expected)


@pytest.mark.limits
def test_long_pictures_take_little_memory() -> None:
    """A square around this one would take eleven gigabytes."""
    code = """
import numpy as np
from edge_vlm.families.llava_onevision.family import FAMILY
from edge_vlm.families.llava_onevision.released import IMAGE_PROCESSOR
from edge_vlm.machine.memory import peak_rss_bytes
pixels = np.full((30, 60_000, 3), 200, np.uint8)
FAMILY.cut(pixels, IMAGE_PROCESSOR)
FAMILY.cut(pixels, FAMILY.beside(IMAGE_PROCESSOR, 2))
FAMILY.cut(pixels.swapaxes(0, 1)[:9000], FAMILY.beside(IMAGE_PROCESSOR, 2))
print(peak_rss_bytes())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert int(run.stdout) < 500_000_000


def test_a_side_may_be_too_long() -> None:
    for processor in (IMAGE_PROCESSOR, ONE_OF_TWO):
        with pytest.raises(ImageError, match="70000x1 pixels: one side is longer than 65535"):
            FAMILY.layout(70_000, 1, processor)
        with pytest.raises(ImageError, match="make it smaller or crop it"):
            FAMILY.cut(np.zeros((70_000, 1, 3), np.uint8), processor)


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_boxes_cover_the_picture_and_its_tokens(width: int, height: int) -> None:
    for processor in (IMAGE_PROCESSOR, ONE_OF_TWO):
        plan = FAMILY.layout(width, height, processor)
        boxes = list(FAMILY.boxes(plan, processor))
        assert sum(count for _, _, count in boxes) == plan.tile_tokens
        area = sum((right - left) * (low - top) for _, (left, top, right, low), _ in boxes)
        assert area == pytest.approx(1)
        for extent, _, _ in boxes:
            assert all(0 <= side <= 1 for side in extent)


def test_an_overview_is_drawn_for_any_shape() -> None:
    for width, height in SHAPES:
        sheet = draw_tiling(np.full((height, width, 3), 90, np.uint8), IMAGE_PROCESSOR)
        assert sheet.width > 300


def test_the_largest_pictures_are_the_largest() -> None:
    rng = np.random.default_rng(0)
    for max_tiles in (1, 4, 9, 12, 36):
        processor = FAMILY.limited(IMAGE_PROCESSOR, max_tiles)
        plans = [FAMILY.layout(*size, processor) for size in FAMILY.largest(processor)]
        for width, height in rng.integers(1, 2600, (500, 2)).tolist():
            found = FAMILY.layout(width, height, processor)
            assert found.n_tokens <= max(plan.n_tokens for plan in plans)
            assert found.n_crops <= max(plan.n_crops for plan in plans)


def test_the_planner_counts_the_same() -> None:
    for name, hidden in (("llava-onevision-0.5b", 896), ("llava-onevision-7b", 3584)):
        model = model_sizes(name=name)
        assert model.decoder.hidden_size == hidden
        for row in TABLE["sizes"]:
            plan = plan_image(row["width"], row["height"], model.processor, model.decoder)
            assert (plan.image_tokens, plan.crops) == (row["n_image_tokens"], row["n_crops"])
        request = plan_request(model, 1300, 1003)
        assert request.prompt_tokens == 7261 + 32
        assert request.flops.vision == 13 * model.work.tower_flops
    # Known numbers of the released models: 0.4 billion parameters see, 0.5 and 7.6 billion speak.
    small = model_sizes("fp16", "f16", name="llava-onevision-0.5b")
    assert small.vision_bytes == pytest.approx(2 * 0.4e9, rel=0.03)
    assert small.decoder_bytes == pytest.approx(2 * 0.494e9, rel=0.01)
    large = model_sizes("fp16", "f16", name="llava-onevision-7b")
    assert large.decoder_bytes == pytest.approx(2 * 7.62e9, rel=0.01)
