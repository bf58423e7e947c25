"""JinaTiles, tokens and masks against the published implementation's numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm import ImageError
from edge_vlm.families.jina_vlm.released import IMAGE_PROCESSOR
from edge_vlm.families.jina_vlm.tiling import JinaImageProcessor as ImageProcessor
from edge_vlm.families.jina_vlm.tiling import (
    cut_tiles,
    patch_order,
    plan_picture,
    token_block,
)
from edge_vlm.pictures.image import load_image
from tests.conftest import GOLDEN, GoldenCase, examples, golden_cases

WITH_IMAGES = [case for case in golden_cases() if case.images]


def processor_of(case: GoldenCase) -> ImageProcessor:
    path = GOLDEN / case.model / "checkpoint" / "preprocessor_config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    fields = {name: data[name] for name in ImageProcessor.model_fields if name in data}
    return ImageProcessor.model_validate_json(json.dumps(fields))


def test_size_table_exactly() -> None:
    table = json.loads((GOLDEN / "size_table.json").read_text(encoding="utf-8"))
    for row in table["sizes"]:
        if "error" in row:
            with pytest.raises(ImageError, match="200 times"):
                plan_picture(row["width"], row["height"], IMAGE_PROCESSOR)
            continue
        plan = plan_picture(row["width"], row["height"], IMAGE_PROCESSOR)
        assert plan.resized_hw == (row["resized_height"], row["resized_width"]), row
        assert plan.tiling == tuple(row["tiling"]), row
        assert plan.tiled_hw == (row["tiled_height"], row["tiled_width"]), row
        assert plan.n_crops == row["n_crops"], row
        assert plan.n_patch_tokens == row["n_patch_tokens"], row
        assert plan.n_tokens == row["n_image_tokens"], row


@pytest.mark.parametrize("case", WITH_IMAGES, ids=str)
def test_crops_tokens_and_positions(case: GoldenCase) -> None:
    processor = processor_of(case)
    path = GOLDEN / case.model / "checkpoint" / "preprocessor_config.json"
    ids = json.loads(path.read_text(encoding="utf-8"))
    letters = {
        "s": ids["start_token_id"],
        "e": ids["end_token_id"],
        "p": ids["patch_token_id"],
        "c": ids["column_token_id"],
    }
    for index, image in enumerate(case.images):

        def golden(name: str, index: int = index) -> np.ndarray:
            return case.arrays[f"img{index}_{name}"]

        tiles = cut_tiles(load_image(image, alpha="drop"), processor)
        crops = tiles.crops
        assert crops.dtype == np.float32
        assert crops.shape == tuple(golden("crops_shape"))
        rows = crops[:, [0, crops.shape[1] // 2, crops.shape[1] - 1]]
        assert np.array_equal(rows, golden("crops_rows"))
        # No grey level differs: one alone would move a sum by 0.007.
        np.testing.assert_allclose(
            crops.sum((1, 2), dtype=np.float64), golden("crops_sum"), rtol=0, atol=1e-6
        )
        squares = np.square(crops, dtype=np.float64).sum((1, 2))
        np.testing.assert_allclose(squares, golden("crops_sumsq"), rtol=1e-12, atol=1e-6)

        block = token_block(tiles.plan, processor)
        assert [letters[code] for code in block] == golden("tokens").tolist()
        order = patch_order(tiles.plan, processor)
        positions = np.flatnonzero(block == "p")
        used = np.where(order >= 0, positions[order], -10000)
        assert np.array_equal(used, golden("input_idx"))
        # Mask row k belongs to crop k; the last is -1, which is below 1 but not 0.
        assert np.array_equal(tiles.is_last, (golden("masks") == -1).all(axis=1))
        blank = [i for i, crop in enumerate(crops) if (crop == -1).all()]
        assert blank == case.data["per_image"][index]["blank_crops"]


def test_an_all_black_picture_is_minus_one_everywhere() -> None:
    tiles = cut_tiles(np.zeros((700, 900, 3), np.uint8), IMAGE_PROCESSOR)
    assert (tiles.crops == -1).all()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 200), (200, 1), (2, 2), (20000, 100)])
def test_extreme_shapes(width: int, height: int) -> None:
    pixels = np.full((height, width, 3), 255, np.uint8)
    tiles = cut_tiles(pixels, IMAGE_PROCESSOR)
    assert (tiles.crops == 1).all()


@pytest.mark.parametrize(("width", "height"), [(201, 1), (1, 201), (20101, 100)])
def test_aspect_ratio_above_200(width: int, height: int) -> None:
    with pytest.raises(ImageError, match="200 times"):
        plan_picture(width, height, IMAGE_PROCESSOR)


@settings(max_examples=examples(100, 2000), deadline=None)
@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), tiles=st.integers(1, 16))
def test_every_patch_token_gets_one_vector(width: int, height: int, tiles: int) -> None:
    processor = IMAGE_PROCESSOR.model_copy(update={"max_crops": tiles})
    try:
        plan = plan_picture(width, height, processor)
    except ImageError:
        assert max(width, height) > 200 * min(width, height)
        return
    order = patch_order(plan, processor)
    used = np.sort(order[order >= 0])
    assert np.array_equal(used, np.arange(plan.n_patch_tokens))
    block = token_block(plan, processor)
    assert (block == "p").sum() == plan.n_patch_tokens
    assert len(block) == plan.n_tokens
    assert 2 <= plan.n_crops <= tiles + 1


@settings(max_examples=examples(15, 250), deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900), seed=st.integers(0, 2**32 - 1))
def test_neighbouring_crops_agree_where_they_overlap(width: int, height: int, seed: int) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    tiles = cut_tiles(pixels, IMAGE_PROCESSOR)
    assert np.abs(tiles.crops).max() <= 1
    rows, columns = tiles.plan.tiling
    grid = tiles.crops[1:].reshape(rows, columns, 27, 27, 588)
    assert np.array_equal(grid[:, :-1, :, 19:], grid[:, 1:, :, :8])
    assert np.array_equal(grid[:-1, :, 19:], grid[1:, :, :8])
