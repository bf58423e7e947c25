"""InternVL from pixels to rows: sizes, crops and blocks are the published ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_vlm.errors import ImageError
from edge_vlm.families.internvl import tiling
from edge_vlm.families.internvl.family import FAMILY
from edge_vlm.families.internvl.processor import InternTokens
from edge_vlm.families.internvl.released import IMAGE_PROCESSOR
from edge_vlm.families.resample import resize_bicubic_8bit
from edge_vlm.pictures.image import load_image
from edge_vlm.pictures.overview import draw_tiling
from edge_vlm.planning.models import model_sizes
from edge_vlm.planning.request import plan_image, plan_request
from tests.conftest import GOLDEN, GoldenCase, load_golden

UInt8 = npt.NDArray[np.uint8]
TABLE = json.loads((GOLDEN / "internvl/size_table.json").read_text(encoding="utf-8"))
SHAPES = ((300, 200), (20, 900), (901, 205), (1300, 1003), (448, 448), (7000, 20), (1, 5000))


def pictures() -> list[Any]:
    """Each picture of each case, and its number there."""
    return [
        pytest.param(case, index, id=f"{case.name}-{index}")
        for case in load_golden("internvl").cases.values()
        for index in range(len(case.images))
    ]


def noise(height: int, width: int) -> UInt8:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("row", TABLE["sizes"], ids=lambda row: f"{row['width']}x{row['height']}")
def test_size_table(row: dict[str, Any]) -> None:
    plan = FAMILY.layout(row["width"], row["height"], IMAGE_PROCESSOR)
    assert row == {
        "width": plan.original_hw[1],
        "height": plan.original_hw[0],
        "tiling": list(plan.tiling),
        "resized_height": plan.resized_hw[0],
        "resized_width": plan.resized_hw[1],
        "n_tiles": plan.n_crops,
        "n_image_tokens": plan.overview_tokens + plan.tile_tokens,
        "n_block_tokens": plan.n_tokens,
    }


def test_the_released_settings_are_those_of_the_table() -> None:
    assert TABLE["settings"] == {
        "size": IMAGE_PROCESSOR.tile_size,
        "min_patches": IMAGE_PROCESSOR.min_crops,
        "max_patches": IMAGE_PROCESSOR.max_crops,
        "use_thumbnail": IMAGE_PROCESSOR.use_thumbnail,
        "image_seq_length": IMAGE_PROCESSOR.tokens_per_crop,
    }


@pytest.mark.parametrize(
    ("width", "height", "tiling_hw"),
    [(633, 633, (1, 1)), (634, 634, (2, 2)), (1000, 1000, (3, 3)), (33, 24, (3, 4))],
)
def test_of_equal_ratios_a_larger_one_has_to_be_filled(
    width: int, height: int, tiling_hw: tuple[int, int]
) -> None:
    assert FAMILY.layout(width, height, IMAGE_PROCESSOR).tiling == tiling_hw


@pytest.mark.parametrize(("case", "index"), pictures())
def test_pixels_equal_the_published_ones(case: GoldenCase, index: int) -> None:
    golden, expected = case.arrays, case.data["per_image"][index]
    pixels = load_image(case.images[index], alpha="drop")
    plan = FAMILY.layout(expected["width"], expected["height"], IMAGE_PROCESSOR)
    assert list(plan.tiling) == expected["tiling"]
    assert list(plan.resized_hw) == expected["resized_hw"]
    assert plan.n_tokens == expected["n_block_tokens"]
    levels = tiling.cut_levels(pixels, plan, IMAGE_PROCESSOR)
    sums = levels.sum(axis=(1, 2), dtype=np.int64)
    np.testing.assert_array_equal(sums, golden[f"img{index}_grey_sum"])

    crops = FAMILY.cut(pixels, IMAGE_PROCESSOR).crops
    assert crops.shape == (expected["n_tiles"], 1024, 588)
    grid = crops.reshape(-1, 32, 32, 3, 14, 14).transpose(0, 3, 1, 4, 2, 5)
    whole = grid.reshape(-1, 3, 448, 448)
    assert whole.shape == tuple(golden[f"img{index}_pixels_shape"])
    np.testing.assert_array_equal(whole[:, :, [0, 223, 447]], golden[f"img{index}_pixels_rows"])
    values = whole.astype(np.float64)
    np.testing.assert_allclose(
        values.sum(axis=(2, 3)), golden[f"img{index}_pixels_sum"], rtol=1e-12, atol=1e-7
    )
    np.testing.assert_allclose(
        np.square(values).sum(axis=(2, 3)), golden[f"img{index}_pixels_sumsq"], rtol=1e-12
    )


def slowly(line: list[int], n_out: int) -> list[int]:
    """One line of grey levels resized as torchvision does, number by number."""
    scale = len(line) / n_out
    stretch = max(scale, 1.0)
    support = 2 * stretch
    all_taps = []
    for place in range(n_out):
        centre = scale * (place + 0.5)
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), len(line))
        weights = []
        for source in range(low, high):
            x = abs((source - centre + 0.5) / stretch)
            near = (1.5 * x - 2.5) * x * x + 1
            far = (((x - 5) * x + 8) * x - 4) * -0.5
            weights.append(near if x < 1 else far if x < 2 else 0.0)
        all_taps.append((low, [weight / sum(weights) for weight in weights]))
    largest = max(max(weights) for _, weights in all_taps)
    bits = max(n for n in range(23) if int(0.5 + largest * 2**n) < 2**15)
    found = []
    for low, weights in all_taps:
        whole = [math.trunc(w * 2**bits + math.copysign(0.5, w)) for w in weights]
        total = sum(w * line[low + index] for index, w in enumerate(whole))
        found.append(min(255, max(0, (total + 2 ** (bits - 1)) >> bits)))
    return found


@pytest.mark.parametrize("n_in", [1, 2, 5, 40, 97])
@pytest.mark.parametrize("n_out", [1, 3, 40, 64, 200])
def test_a_resize_is_the_published_arithmetic(n_in: int, n_out: int) -> None:
    pixels = noise(n_in, 3)
    expected = [
        slowly(pixels[:, x, channel].tolist(), n_out) for x in range(3) for channel in (0, 1, 2)
    ]
    if n_in == n_out:
        expected = pixels.reshape(n_in, 9).T.tolist()
    upright = resize_bicubic_8bit(pixels, n_out, 3)
    np.testing.assert_array_equal(upright.reshape(n_out, 9).T, expected)
    lying = resize_bicubic_8bit(np.ascontiguousarray(pixels.swapaxes(0, 1)), 3, n_out)
    np.testing.assert_array_equal(lying.swapaxes(0, 1), upright)


def test_a_resize_goes_along_rows_first() -> None:
    pixels = noise(300, 200)
    between = resize_bicubic_8bit(pixels, 300, 448)
    expected = resize_bicubic_8bit(between, 97, 448)
    np.testing.assert_array_equal(resize_bicubic_8bit(pixels, 97, 448), expected)


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_rows_are_the_crops_between_markers(width: int, height: int) -> None:
    plan = FAMILY.layout(width, height, IMAGE_PROCESSOR)
    shape = (plan.n_crops, IMAGE_PROCESSOR.tokens_per_crop, 5)
    embeddings = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    markers = np.full((2, 5), 7, np.float32)
    rows = FAMILY.rows(embeddings, markers, plan, IMAGE_PROCESSOR)
    assert rows.shape == (plan.n_tokens, 5)
    np.testing.assert_array_equal(rows[[0, -1]], markers)
    np.testing.assert_array_equal(rows[1:-1].reshape(shape), embeddings)
    tokens = InternTokens(stop=(1,), image=5, start=3, end=4, special={})
    block = FAMILY.block(plan, IMAGE_PROCESSOR, tokens)
    assert block.tolist() == [3, *[5] * (plan.n_tokens - 2), 4]


@pytest.mark.parametrize("max_tiles", [1, 2, 5, 12, 100])
def test_fewer_tiles(max_tiles: int) -> None:
    limited = FAMILY.limited(IMAGE_PROCESSOR, max_tiles)
    assert limited.max_tiles == min(max_tiles, 12)
    for width, height in SHAPES:
        assert FAMILY.layout(width, height, limited).n_crops <= 1 + max_tiles
    assert FAMILY.layout(640, 480, FAMILY.limited(IMAGE_PROCESSOR, 1)).n_tokens == 258
    if max_tiles >= 12:
        assert limited == IMAGE_PROCESSOR
    several = IMAGE_PROCESSOR.model_copy(update={"min_crops": 4})
    assert FAMILY.limited(several, 2).min_crops == 2


def test_the_largest_picture_is_the_largest() -> None:
    rng = np.random.default_rng(0)
    for max_tiles in (1, 2, 7, 12):
        processor = FAMILY.limited(IMAGE_PROCESSOR, max_tiles)
        (largest,) = (FAMILY.layout(*size, processor) for size in FAMILY.largest(processor))
        assert math.prod(largest.tiling) == max_tiles
        for width, height in rng.integers(1, 2600, (500, 2)).tolist():
            assert FAMILY.layout(width, height, processor).n_tokens <= largest.n_tokens


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_boxes_cover_the_picture_and_its_tokens(width: int, height: int) -> None:
    plan = FAMILY.layout(width, height, IMAGE_PROCESSOR)
    boxes = list(FAMILY.boxes(plan, IMAGE_PROCESSOR))
    assert sum(count for _, _, count in boxes) == plan.tile_tokens
    area = sum((right - left) * (low - top) for _, (left, top, right, low), _ in boxes)
    assert area == pytest.approx(1)
    sheet = draw_tiling(np.full((height, width, 3), 90, np.uint8), IMAGE_PROCESSOR)
    assert sheet.width > 300


@pytest.mark.limits
def test_long_pictures_take_little_memory() -> None:
    code = """
import numpy as np
from edge_vlm.families.internvl.family import FAMILY
from edge_vlm.families.internvl.released import IMAGE_PROCESSOR
from edge_vlm.machine.memory import peak_rss_bytes
FAMILY.cut(np.full((200, 60_000, 3), 200, np.uint8), IMAGE_PROCESSOR)
FAMILY.cut(np.full((60_000, 200, 3), 200, np.uint8), IMAGE_PROCESSOR)
print(peak_rss_bytes())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert int(run.stdout) < 400_000_000  # the picture has 36 MB, what becomes of it 31 MB


def test_a_side_may_be_too_long() -> None:
    with pytest.raises(ImageError, match="70000x1 pixels: one side is longer than 65535"):
        FAMILY.layout(70_000, 1, IMAGE_PROCESSOR)
    with pytest.raises(ImageError, match="make it smaller or crop it"):
        FAMILY.cut(np.zeros((70_000, 1, 3), np.uint8), IMAGE_PROCESSOR)


def test_the_planner_counts_the_same() -> None:
    for name in FAMILY.released():
        model = model_sizes(name=name)
        for row in TABLE["sizes"]:
            plan = plan_image(row["width"], row["height"], model.processor, model.decoder)
            assert (plan.image_tokens, plan.crops) == (row["n_block_tokens"], row["n_tiles"])
    model = model_sizes("fp16", "f16", name="internvl2.5-1b")
    request = plan_request(model, 1200, 900)
    assert request.prompt_tokens == 3330 + 32
    assert request.flops.vision == 13 * model.work.tower_flops


@pytest.mark.parametrize(
    ("name", "seeing", "speaking"),
    [
        ("internvl2.5-1b", 0.309e9, 0.630e9),
        ("internvl2.5-2b", 0.317e9, 1.889e9),
        ("internvl2.5-4b", 0.317e9, 3.397e9),
        ("internvl2.5-8b", 0.338e9, 7.738e9),
        ("internvl3-8b", 0.333e9, 7.613e9),
    ],
)
def test_the_released_models_have_as_many_parameters(
    name: str, seeing: float, speaking: float
) -> None:
    """InternViT-300M with the projector, and the decoder with a head of its own."""
    model = model_sizes("fp16", "f16", name=name)
    assert model.vision_bytes == pytest.approx(2 * seeing, rel=0.01)
    assert model.decoder_bytes == pytest.approx(2 * speaking, rel=0.01)
