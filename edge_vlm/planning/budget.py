"""The KV-cache budget: how many positions it holds, and what to do when that is too few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_vlm.errors import BudgetError
from edge_vlm.families.base import family_of
from edge_vlm.machine.engine_settings import KV_TYPES

if TYPE_CHECKING:
    from edge_vlm.families.base import ImageProcessor
    from edge_vlm.families.sizes import Decoder

CONTEXT_STEP = 256  # llama.cpp rounds a context up to a multiple of this many positions
DEFAULT_MAX_TOKENS = 512  # of an answer


def context_size(n_positions: int) -> int:
    """Positions llama.cpp makes room for."""
    return -(-n_positions // CONTEXT_STEP) * CONTEXT_STEP


def limit_tiles(processor: ImageProcessor, max_tiles: int | None) -> ImageProcessor:
    """The same image processor with at most ``max_tiles`` crops besides the thumbnail."""
    if max_tiles is None or max_tiles >= processor.max_tiles:
        return processor
    limited: ImageProcessor = family_of(processor).limited(processor, max_tiles)
    return limited


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

    ``needed`` are the positions of the prompt and of a short answer, ``sizes_hw`` (height, width)
    of the pictures; ``processor`` has the request's tile limit, ``kv_budget`` is in bytes.

    Raises:
        BudgetError: more positions are needed than there may be.
    """
    allowed = budget_positions(decoder, kv_budget, kv_type)
    if needed <= allowed:
        return
    per_token = decoder.kv_bytes_per_token(KV_TYPES[kv_type])
    rounded = context_size(needed)
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
    family = family_of(processor)

    def total(settings: ImageProcessor) -> int:
        return sum(family.layout(w, h, settings).n_tokens for h, w in sizes_hw)

    now = total(processor)
    for tiles in range(processor.max_tiles - 1, 0, -1):
        if now - total(limit_tiles(processor, tiles)) >= excess:
            return tiles
    return 0
