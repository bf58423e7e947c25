"""Pixtral from pixels to patches and lines of tokens: size and values are the published."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import BudgetError, ImageError
from edge_vlm.families.base import find_family
from edge_vlm.families.pixtral import patches
from edge_vlm.families.pixtral.family import FAMILY
from edge_vlm.families.pixtral.prompt import PixtralPrompt, PixtralTokens
from edge_vlm.families.pixtral.released import IMAGE_PROCESSOR
from edge_vlm.pictures.image import load_image
from edge_vlm.pictures.overview import draw_tiling
from edge_vlm.planning.budget import check_budget, limit_tiles
from edge_vlm.planning.models import model_sizes
from edge_vlm.planning.profiles import PROFILES
from edge_vlm.planning.request import plan_image, plan_request
from edge_vlm.prompt.template import ChatTemplate
from tests.conftest import GOLDEN, GoldenCase, load_golden

TABLE = json.loads((GOLDEN / "pixtral/size_table.json").read_text(encoding="utf-8"))
SIZES = [row for row in TABLE["sizes"] if "error" not in row]
REFUSED = [row for row in TABLE["sizes"] if "error" in row]
SHAPES = ((300, 200), (20, 900), (901, 205), (2728, 2046), (7000, 90), (1, 150), (1, 1))
TOKENS = PixtralTokens(stop=(2,), image=10, image_break=12, image_end=13, special={"[IMG]": 10})


def pictures() -> list[Any]:
    """Each picture of each case, and its number there."""
    return [
        pytest.param(case, index, id=f"{case.name}-{index}")
        for case in load_golden("pixtral").cases.values()
        for index in range(len(case.images))
    ]


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"{row['width']}x{row['height']}")
def test_size_table(row: dict[str, Any]) -> None:
    plan = FAMILY.layout(row["width"], row["height"], IMAGE_PROCESSOR)
    assert row == {
        "width": plan.original_hw[1],
        "height": plan.original_hw[0],
        "resized_hw": list(plan.resized_hw),
        "patches_hw": list(plan.tiling),
        "n_image_tokens": plan.n_tokens,
    }
    assert plan.n_crops == 1
    assert len(FAMILY.block(plan, IMAGE_PROCESSOR, TOKENS)) == plan.n_tokens


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row['width']}x{row['height']}")
def test_what_the_published_code_cannot_resize(row: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match="it would be less than a pixel thick; crop it first"):
        FAMILY.layout(row["width"], row["height"], IMAGE_PROCESSOR)


def test_the_released_settings_are_those_of_the_table() -> None:
    settings = TABLE["settings"]
    assert settings["size"]["longest_edge"] == IMAGE_PROCESSOR.longest_edge
    assert settings["patch_size"] == IMAGE_PROCESSOR.patch_size


@pytest.mark.parametrize(("case", "index"), pictures())
def test_pixels_equal_the_published_ones(case: GoldenCase, index: int) -> None:
    golden = case.arrays
    tiles = FAMILY.cut(load_image(case.images[index], alpha="drop"), IMAGE_PROCESSOR)
    rows, columns = tiles.plan.tiling
    assert tiles.crops.shape == (1, rows * columns, 768)
    assert list(tiles.plan.resized_hw) == golden[f"img{index}_crops_shape"][2:].tolist()
    # Patches laid side by side again: (channel, y, x).
    values = tiles.crops[0].reshape(rows, columns, 3, 16, 16).transpose(2, 0, 3, 1, 4)
    values = values.reshape(3, 16 * rows, 16 * columns)
    height = values.shape[1]
    published = golden[f"img{index}_crops_rows"][0]
    np.testing.assert_array_equal(values[:, [0, height // 2, height - 1]], published)
    exact = values.astype(np.float64)
    for name, found in (("sum", exact.sum()), ("sumsq", np.square(exact).sum())):
        np.testing.assert_allclose([found], golden[f"img{index}_crops_{name}"], rtol=1e-12)
    # Every 8-bit level, found again from the values.
    tables = patches.normalised_levels(IMAGE_PROCESSOR)
    sums = []
    for channel, table in enumerate(tables):
        levels = np.searchsorted(table, values[channel])
        np.testing.assert_array_equal(table[levels], values[channel])
        sums.append(int(levels.sum()))
    assert sums == golden[f"img{index}_crops_u8_sum"][0].tolist()


@pytest.mark.parametrize(("case", "index"), pictures())
def test_the_block_equals_the_published_one(case: GoldenCase, index: int) -> None:
    golden, expected = case.arrays, case.data["per_image"][index]
    plan = FAMILY.layout(expected["width"], expected["height"], IMAGE_PROCESSOR)
    assert list(plan.tiling) == expected["patches_hw"]
    ids = FAMILY.block(plan, IMAGE_PROCESSOR, TOKENS)
    assert ids.tolist() == golden[f"img{index}_tokens"].tolist()
    start = golden[f"img{index}_start"]
    np.testing.assert_array_equal(golden["input_ids"][start : start + len(ids)], ids)
    # Vectors take the places of [IMG], in reading order.
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1, plan.tile_tokens, 5), np.float32)
    ends = rng.standard_normal((2, 5), np.float32)
    rows = FAMILY.rows(vectors, ends, plan, IMAGE_PROCESSOR)
    assert rows.shape == (plan.n_tokens, 5)
    np.testing.assert_array_equal(rows[ids == 10], vectors[0])
    for token, end in ((12, ends[0]), (13, ends[1])):
        np.testing.assert_array_equal(
            rows[ids == token], np.tile(end, (int((ids == token).sum()), 1))
        )


def test_a_patch_knows_its_row_and_column() -> None:
    tiles = FAMILY.cut(np.zeros((40, 70, 3), np.uint8), IMAGE_PROCESSOR)
    expected = [[row, column] for row in range(3) for column in range(5)]
    assert tiles.feed["places"].tolist() == [expected]
    for shape in ((2, 9, 768), (2, 10, 768)):
        feed = FAMILY.inputs(np.zeros(shape, np.float32), IMAGE_PROCESSOR)
        assert feed["places"].shape == (*shape[:2], 2)


@pytest.mark.parametrize("max_tiles", [1, 2, 5, 15, 16, 100])
def test_fewer_pixels(max_tiles: int) -> None:
    """What counts as a tile is 256 x 256 pixels, wherever they lie."""
    limited = limit_tiles(IMAGE_PROCESSOR, max_tiles)
    assert limited.max_tiles == min(max_tiles, 16)
    for width, height in (*SHAPES, *FAMILY.largest(limited), (9000, 9000), (20_000, 100)):
        plan = FAMILY.layout(width, height, limited)
        assert 1 <= plan.tile_tokens <= 256 * max_tiles
        assert max(plan.resized_hw) <= 1024
        whole = FAMILY.layout(width, height, IMAGE_PROCESSOR)
        if whole.tile_tokens <= 256 * max_tiles:
            assert plan == whole
        else:
            assert plan.is_reduced
            if min(plan.tiling) > 8:  # the shape stays
                assert plan.tiling[0] / plan.tiling[1] == pytest.approx(height / width, rel=0.15)
                assert plan.tile_tokens > 0.8 * 256 * max_tiles
    if max_tiles >= 16:
        assert limited == IMAGE_PROCESSOR


def test_the_largest_pictures_are_the_largest() -> None:
    """A narrow one has more line ends."""
    rng = np.random.default_rng(0)
    for max_tiles in (1, 2, 7, 16):
        processor = limit_tiles(IMAGE_PROCESSOR, max_tiles)
        plans = [FAMILY.layout(*size, processor) for size in FAMILY.largest(processor)]
        most = max(plan.n_tokens for plan in plans)
        assert max(plan.tile_tokens for plan in plans) == 256 * max_tiles
        sizes = rng.integers(10, 1500, (1000, 2)).tolist()
        for width, height in [*sizes, (100, 1024), (64, 1024), (250, 2000)]:
            plan = FAMILY.layout(width, height, processor)
            assert (plan.n_tokens <= most, plan.tile_tokens <= 256 * max_tiles) == (True, True)
    assert most == 4160


def test_the_planner_counts_the_same() -> None:
    model = model_sizes(name="pixtral-12b")
    for row in SIZES:
        plan = plan_image(row["width"], row["height"], model.processor, model.decoder)
        assert (plan.image_tokens, plan.crops) == (row["n_image_tokens"], 1)
    # Known numbers of the released model: 0.4 billion parameters see, 12.2 speak.
    sizes = model_sizes("fp16", "f16", name="pixtral-12b")
    assert sizes.vision_bytes == pytest.approx(2 * 0.435e9, rel=0.01)
    assert sizes.decoder_bytes == pytest.approx(2 * 12.25e9, rel=0.01)
    assert model.decoder.kv_bytes_per_token() == 160 * 1024


def test_work_and_memory_follow_the_size_of_a_picture() -> None:
    model = model_sizes(name="pixtral-12b")
    speeds = PROFILES["laptop-4core"].speeds(model)
    one, two, four = (plan_request(model, n * 256, 256, speeds=speeds) for n in (1, 2, 4))
    assert one.flops.vision == model.work.tower_flops
    assert one.seconds
    assert two.seconds
    assert one.seconds.vision == pytest.approx(speeds.vision_seconds_per_tile)
    assert 2 < two.seconds.vision / one.seconds.vision < 2.2
    # Scores grow with the square: exactly the difference to twice the work.
    assert two.flops.vision - 2 * one.flops.vision == 24 * 4 * 1024 * 2 * 256**2
    assert four.memory.onnxruntime_arena == pytest.approx(
        4 * one.memory.onnxruntime_arena, rel=0.01
    )
    assert four.image.image_tokens == 16 * 65


def test_the_budget_says_what_would_fit() -> None:
    model = model_sizes(name="pixtral-12b")
    with pytest.raises(BudgetError, match=r"6 tiles would fit \(--max-tiles 6\)"):
        check_budget(3120 + 64, [(2046, 2728)], model.processor, model.decoder, 300_000_000, "f16")


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_an_overview_is_drawn_for_any_shape(width: int, height: int) -> None:
    pixels = np.full((height, width, 3), 90, np.uint8)
    assert draw_tiling(pixels, IMAGE_PROCESSOR).width > 300
    plan = FAMILY.layout(width, height, IMAGE_PROCESSOR)
    ((extent, used, count),) = FAMILY.boxes(plan, IMAGE_PROCESSOR)
    assert extent == used == (0, 0, 1, 1)
    assert count == plan.tile_tokens


def test_the_template_is_given_what_it_reads() -> None:
    """The released one takes what others than the user say as text, and a text part's content."""
    texts = {"image_prompt_token": "[IMG]", "bos_token": "<s>", "eos_token": "</s>"}
    prompt = PixtralPrompt.model_validate({**texts, "normalizer": None})
    template = ChatTemplate(
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '[INST]' }}"
        "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
        "{% for chunk in message['content'] %}{% if chunk['type'] == 'text' %}"
        "{{ chunk['content'] }}{% else %}{{ '[IMG]' }}{% endif %}{% endfor %}{{ '[/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )

    def text(said: str) -> dict[str, str]:
        return {"type": "text", "text": said}

    said = [
        ("system", [text("Be brief."), text("Please.")]),
        ("user", [text("Which?"), {"type": "image"}]),
        ("assistant", [text("That.")]),
        ("user", [text("Why?")]),
    ]
    messages = [{"role": role, "content": prompt.content(role, parts)} for role, parts in said]
    assert template.render(messages=messages, **prompt.template_variables()) == (
        "<s>[INST]Which?[IMG][/INST]That.</s>[INST]Be brief. Please.\n\nWhy?[/INST]"
    )


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="max_patches is more than longest_edge allows"):
        type(IMAGE_PROCESSOR).model_validate({**IMAGE_PROCESSOR.model_dump(), "max_patches": 4097})
    assert find_family("pixtral") is FAMILY
