"""Settings of the machine, sizes, the planner's arithmetic."""

from __future__ import annotations

import pytest

from edge_vlm import BudgetError, InputError, MachineSettings
from edge_vlm.families.jina_vlm.released import DECODER, IMAGE_PROCESSOR
from edge_vlm.machine.settings import KV_BUDGET, parse_size
from edge_vlm.planning.budget import budget_positions, check_budget, limit_tiles
from edge_vlm.planning.request import plan_image


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        ("1k", 1000),
        ("530MB", 530_000_000),
        ("0.5GiB", 1 << 29),
        (" 2 gib ", 2 << 30),
        ("1.5T", 1_500_000_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "-1",
        "1e9",
        "1iB",
        "10 XB",
        "1..5G",
        "nan",
        "9" * 400,
        "9" * 4500,
        f"0.{'1' * 4500}",
    ],
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_settings_from_the_environment() -> None:
    settings = MachineSettings.from_environment(
        {"EDGE_VLM_THREADS": "3", "EDGE_VLM_KV_BUDGET": "200MB", "EDGE_VLM_ENGINE_LOGS": "0"},
        max_pixels=5,
        threads=None,
    )
    assert (settings.threads, settings.kv_budget, settings.max_pixels) == (3, 200_000_000, 5)
    assert not settings.engine_logs
    assert MachineSettings.from_environment({}).kv_budget == KV_BUDGET


@pytest.mark.parametrize(
    "bad", [{"threads": 0}, {"kv_budget": 0}, {"kv_type": "q9"}, {"batch_size": 0}, {"cache": 0}]
)
def test_settings_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        MachineSettings(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["KV_BUDGET", "MAX_PIXELS", "RAM", "CACHE_SIZE", "THREADS", "MAX_TILES", "GPU_LAYERS"]
)
@pytest.mark.parametrize("digits", [20, 28, 400, 4500])
def test_numbers_of_many_digits_are_out_of_range(name: str, digits: int) -> None:
    with pytest.raises(InputError, match=f"(?i){name}: .{{,200}}$"):
        MachineSettings.from_environment({f"EDGE_VLM_{name}": "9" * digits})


def test_kv_bytes_of_the_released_model() -> None:
    """Published: 2,366 tokens take 0.53 GB at four bytes an element; 271 MB in f16."""
    assert DECODER.kv_bytes_per_token() == 114_688
    assert 2366 * DECODER.kv_bytes_per_token(4.0) == 542_703_616
    assert round(2366 * DECODER.kv_bytes_per_token() / 1e6) == 271


def test_the_default_budget_holds_the_largest_picture() -> None:
    most = max(
        plan_image(w, h, IMAGE_PROCESSOR, DECODER).image_tokens
        for w, h in ((2728, 2046), (300, 4000), (4000, 300), (9999, 9999), (333, 3333))
    )
    assert budget_positions(DECODER, KV_BUDGET, "f16") >= most + 512


def test_budget_positions_never_cost_more_than_the_budget() -> None:
    for budget in range(1_000_000, 800_000_000, 7_654_321):
        positions = budget_positions(DECODER, budget, "f16")
        assert positions % 256 == 0
        assert positions * DECODER.kv_bytes_per_token() <= budget


def test_a_text_that_is_too_long_names_no_tiles() -> None:
    with pytest.raises(BudgetError) as caught:
        check_budget(50_000, [], IMAGE_PROCESSOR, DECODER, KV_BUDGET, "f16")
    assert "tile" not in str(caught.value)
    assert "the model takes 4608" in str(caught.value)


def test_limit_tiles_never_raises_the_models_limit() -> None:
    assert limit_tiles(IMAGE_PROCESSOR, 99) is IMAGE_PROCESSOR
    assert limit_tiles(IMAGE_PROCESSOR, None) is IMAGE_PROCESSOR
    assert limit_tiles(IMAGE_PROCESSOR, 5).max_crops == 5
