"""What a picture costs, from its size alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_vlm.bundle import Decoder, ImageProcessor
from edge_vlm.errors import BudgetError
from edge_vlm.machine import KV_TYPES
from edge_vlm.tiling import n_image_tokens, plan_tiling

CONTEXT_STEP = 256  # llama.cpp rounds a context up to a multiple of this many positions


@dataclass(frozen=True)
class ImagePlan:
    """Sizes and counts for one picture; sizes are (width, height) in pixels."""

    size: tuple[int, int]
    resized: tuple[int, int]
    tiling: tuple[int, int]  # rows, columns
    crops: int
    image_tokens: int
    kv_bytes: int  # of those tokens
    reduced: bool  # whether the model sees fewer pixels than the picture has


def plan_image(
    width: int, height: int, processor: ImageProcessor, decoder: Decoder, kv_type: str = "f16"
) -> ImagePlan:
    """Plan one picture.

    Raises:
        ImageError: the aspect ratio is not supported.
    """
    plan = plan_tiling(height, width, processor)
    tokens = n_image_tokens(plan, processor)
    return ImagePlan(
        size=(width, height),
        resized=(plan.resized_hw[1], plan.resized_hw[0]),
        tiling=plan.tiling,
        crops=plan.n_crops,
        image_tokens=tokens,
        kv_bytes=tokens * decoder.kv_bytes_per_token(KV_TYPES[kv_type]),
        reduced=plan.is_reduced,
    )


def limit_tiles(processor: ImageProcessor, max_tiles: int | None) -> ImageProcessor:
    """The same image processor with at most ``max_tiles`` crops besides the thumbnail."""
    if max_tiles is None or max_tiles >= processor.max_crops:
        return processor
    return processor.model_copy(update={"max_crops": max_tiles})


def budget_positions(decoder: Decoder, kv_budget: int, kv_type: str) -> int:
    """Positions that the KV budget and the model allow: what a context can be created for."""
    per_token = decoder.kv_bytes_per_token(KV_TYPES[kv_type])
    positions = kv_budget // per_token // CONTEXT_STEP * CONTEXT_STEP
    return int(min(positions, decoder.max_sequence_length))


def check_budget(
    needed: int,
    sizes_hw: Sequence[tuple[int, int]],
    processor: ImageProcessor,
    decoder: Decoder,
    kv_budget: int,
    kv_type: str,
) -> None:
    """Refuse a request that does not fit, and say what would.

    Args:
        needed: positions of the prompt and of a short answer.
        sizes_hw: (height, width) of the request's pictures.
        processor: image processor with the request's tile limit.
        decoder: the decoder's geometry.
        kv_budget: bytes.
        kv_type: element type of the KV cache.

    Raises:
        BudgetError: more positions are needed than there may be.
    """
    allowed = budget_positions(decoder, kv_budget, kv_type)
    if needed <= allowed:
        return
    per_token = decoder.kv_bytes_per_token(KV_TYPES[kv_type])
    rounded = -(-needed // CONTEXT_STEP) * CONTEXT_STEP
    limit = (
        f"the KV-cache budget of {kv_budget / 1e6:g} MB holds {allowed}"
        if rounded <= decoder.max_sequence_length
        else f"the model takes {allowed}"
    )
    advice = []
    tiles = _tiles_that_fit(needed - allowed, sizes_hw, processor)
    if tiles:
        advice.append(f"{tiles} tile{'s' if tiles > 1 else ''} would fit (--max-tiles {tiles})")
    elif sizes_hw:
        advice.append("not even one tile would fit")
    if rounded <= decoder.max_sequence_length:
        advice.append(f"this request fits --kv-budget {-(-rounded * per_token // 1_000_000)}MB")
    raise BudgetError(f"the request needs {needed} positions, {limit}; {', or '.join(advice)}")


def _tiles_that_fit(
    excess: int, sizes_hw: Sequence[tuple[int, int]], processor: ImageProcessor
) -> int:
    def total(settings: ImageProcessor) -> int:
        return sum(n_image_tokens(plan_tiling(h, w, settings), settings) for h, w in sizes_hw)

    now = total(processor)
    for tiles in range(processor.max_crops - 1, 0, -1):
        if now - total(limit_tiles(processor, tiles)) >= excess:
            return tiles
    return 0
