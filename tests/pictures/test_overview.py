"""`edge-vlm tiles`: the drawn tiling is the one that is cut."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_vlm.bundle.find import embedded_bundle
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.families.jina_vlm import released
from edge_vlm.families.jina_vlm.tiling import JinaImageProcessor as ImageProcessor
from edge_vlm.families.jina_vlm.tiling import cut_tiles, plan_picture, tile_boxes
from edge_vlm.pictures.overview import draw_tiling
from tests.conftest import Run, assert_one_line

RECEIPT = Path(__file__).parents[2] / "examples/images/receipt-1.png"
DEMO = Bundle.open(embedded_bundle()).manifest.image_processor
PROCESSORS = {"jina-vlm": released.IMAGE_PROCESSOR, "demo": DEMO}


@settings(deadline=None)
@given(
    st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(sorted(PROCESSORS)),
    st.integers(1, 12),
)  # fmt: skip
def test_used_parts_cover_the_picture_once(width: int, height: int, name: str, limit: int) -> None:
    assume(max(width, height) <= 200 * min(width, height))
    processor = PROCESSORS[name].model_copy(update={"max_crops": limit})
    plan = plan_picture(width, height, processor)
    boxes = list(tile_boxes(plan, processor))
    assert len(boxes) == plan.n_crops - 1
    assert sum(count for _, _, count in boxes) == math.prod(plan.grid_hw)
    area = sum((used[2] - used[0]) * (used[3] - used[1]) for _, used, _ in boxes)
    assert area == pytest.approx(1)
    for extent, used, _ in boxes:
        # Rounding pooled vectors up may move a used part's edge by less than one of them.
        slack = (1 / plan.grid_hw[1], 1 / plan.grid_hw[0]) * 2
        assert 0 <= extent[0] < extent[2] <= 1 + 1e-9
        assert 0 <= extent[1] < extent[3] <= 1 + 1e-9
        for inner, outer, room in zip(used[:2], extent[:2], slack[:2], strict=True):
            assert inner > outer - room
        for inner, outer, room in zip(used[2:], extent[2:], slack[2:], strict=True):
            assert inner < outer + room


def test_an_extent_is_where_the_tile_was_cut(tmp_path: Path) -> None:
    """The middle of every drawn extent has the colour in the middle of the tile's crop."""
    y, x = np.mgrid[0:900, 0:1200]
    pixels = np.stack((x * 255 / 1199, y * 255 / 899, np.zeros_like(x)), -1).astype(np.uint8)
    processor: ImageProcessor = released.IMAGE_PROCESSOR
    tiles = cut_tiles(pixels, processor)
    patch, n = processor.patch_size, processor.patches_hw[1]
    for crop, (extent, _, _) in zip(
        tiles.crops[1:], tile_boxes(tiles.plan, processor), strict=True
    ):
        middle = crop[(n // 2) * n + n // 2].reshape(patch, patch, 3).mean((0, 1))
        expected = ((extent[0] + extent[2]) / 2, (extent[1] + extent[3]) / 2)
        assert (middle[:2] + 1) / 2 == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (1, 200), (640, 480), (3000, 40)])
def test_any_shape_can_be_drawn(size: tuple[int, int]) -> None:
    width, height = size
    drawing = draw_tiling(np.zeros((height, width, 3), np.uint8), released.IMAGE_PROCESSOR)
    assert drawing.mode == "RGB"
    assert max(drawing.size) >= 1200


def test_the_command_writes_the_picture(run: Run, tmp_path: Path) -> None:
    result = run("tiles", RECEIPT, "-o", "out.png", "--model", "jina-vlm")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.format == "PNG"
        assert max(drawn.size) > 1200
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    piped = run("tiles", "-", "-o", "-", "--model", "jina-vlm", stdin=RECEIPT.read_bytes()).stdout
    assert piped == (tmp_path / "out.png").read_bytes()


def test_errors_of_the_command(run: Run, tmp_path: Path) -> None:
    assert_one_line(run("tiles", RECEIPT, "-o", "x.gif"), 2, "must end in")
    assert_one_line(run("tiles", RECEIPT, "-o", "none/x.png"), 1, "none", "No such file")
    assert_one_line(run("tiles", "absent.png", "-o", "x.png"), 2, "absent.png")
    assert not list(tmp_path.iterdir())
