"""Budgets in bytes and seconds: what to give up so that a model stays within them."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_vlm.errors import BudgetError
from edge_vlm.families.base import family_of
from edge_vlm.machine.hardware import family, memory_limit
from edge_vlm.machine.memory import available_bytes, can_forget
from edge_vlm.planning import cost
from edge_vlm.planning.budget import DEFAULT_MAX_TOKENS, limit_tiles
from edge_vlm.planning.request import ModelSizes, RequestSettings, plan_request

if TYPE_CHECKING:
    from edge_vlm.families.base import ImageProcessor
    from edge_vlm.machine.engine_settings import EngineSettings
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.planning.request import Memory
    from edge_vlm.planning.speeds import Speeds

SPARE = 0.9  # part of the memory that is available now which "auto" lays claim to
_log = logging.getLogger(__name__)


def within_memory(
    settings: MachineSettings,
    engines: EngineSettings,
    model: ModelSizes,
    *,
    processor_family: str | None = None,
) -> tuple[MachineSettings, EngineSettings]:
    """Settings with which one picture of any size, and its answer, fit in ``settings.ram``.

    What costs the least is given up first: buffers, then time (residency), then the last bits of
    the KV cache, then tiles, at last more bits of the cache. Settings that are given stay. With
    ``residency`` "auto" and no ``ram``, only the residency is chosen, by the memory that is
    available now. ``processor_family`` is that of another machine.

    Raises:
        BudgetError: it cannot be done; the message says how much is missing.
    """
    if settings.ram is None:
        if settings.residency != "auto":
            return settings, engines
        together = replace(settings, residency="together")
        limit = memory_limit()
        free = SPARE * min(available_bytes(), limit or available_bytes())
        if _most(model, together, engines, processor_family).peak <= free:
            return together, engines
        return replace(settings, residency="in-turns"), engines

    needed = []
    for candidate, tried in _candidates(settings, engines, model.processor):
        memory = _most(model, candidate, tried, processor_family)
        if memory.peak <= settings.ram:
            spare = settings.ram - memory.peak
            caches = memory.kv_cache + memory.prompt_kv_cache
            fitted = replace(candidate, kv_budget=min(candidate.kv_budget, caches + spare))
            _log.warning(
                "%.0f MB: %s, KV cache %s, batches of %d, %s; about %.0f MB at the peak",
                settings.ram / 1e6,
                candidate.residency,
                candidate.kv_type,
                tried.batch_size,
                _tiles(candidate.max_tiles),
                memory.peak / 1e6,
            )
            return fitted, tried
        needed.append(memory)
    raise _too_little(settings.ram, min(needed, key=lambda memory: memory.peak))


def _too_little(ram: int, memory: Memory) -> BudgetError:
    """What the smallest that is possible would need."""
    parts = (
        ("vision", memory.vision_weights + memory.onnxruntime_arena),
        ("decoder", memory.decoder_weights + memory.repacked_weights),
        ("KV cache and buffers", memory.kv_cache + memory.prompt_kv_cache + memory.compute_buffers),
        ("Python and picture", memory.python + memory.picture),
    )
    needs = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in parts)
    return BudgetError(
        f"{ram / 1e6:.0f} MB are too little by {(memory.peak - ram) / 1e6:.0f} MB"
        " even with one tile"
        f"{' and taking turns' if memory.residency == 'in-turns' else ''} ({needs});"
        " a bundle of smaller precision would need less"
    )


def _candidates(
    settings: MachineSettings, engines: EngineSettings, processor: ImageProcessor
) -> Iterator[tuple[MachineSettings, EngineSettings]]:
    """From the best to the smallest."""
    given = settings.fixed_engine_settings()
    steps = [engines]
    if engines.flash_attention == "prefill" and "flash_attention" not in given:
        steps.append(replace(engines, flash_attention="off"))  # no cache of a prompt's own
    if "batch_size" not in given:
        smaller = [n for n in (256, 128, 64, 32) if n < engines.batch_size]
        steps += [replace(steps[-1], batch_size=n) for n in smaller]
    auto = settings.residency == "auto"
    residencies = ("together", "in-turns") if auto else (settings.residency,)
    # f16 is what nobody asked for; q4_0 comes last because it is the one that costs quality.
    free = settings.kv_type == "f16"
    most = min(processor.max_tiles, settings.max_tiles or processor.max_tiles)
    for residency in residencies:
        for step in steps:
            yield replace(settings, residency=residency), step
    for kv_type in ("q8_0", "q4_0") if free else (settings.kv_type,):
        for tiles in range(most, 0, -1):
            yield replace(settings, residency=residency, kv_type=kv_type, max_tiles=tiles), step


def _most(
    model: ModelSizes,
    settings: MachineSettings,
    engines: EngineSettings,
    processor_family: str | None,
) -> Memory:
    """Of the picture that needs the most."""
    processor = limit_tiles(model.processor, settings.max_tiles)
    request = request_settings(settings, engines, processor_family=processor_family)
    sizes = family_of(processor).largest(processor)
    plans = [plan_request(model, *size, request, max_tiles=settings.max_tiles) for size in sizes]
    return max((plan.memory for plan in plans), key=lambda memory: memory.peak)


def request_settings(
    settings: MachineSettings, engines: EngineSettings, *, processor_family: str | None = None
) -> RequestSettings:
    """What the planner has to know; of a Linux machine if a ``processor_family`` is given."""
    here = processor_family or family(platform.machine())
    return RequestSettings(
        answer_tokens=DEFAULT_MAX_TOKENS,
        kv_type=settings.kv_type,
        kv_budget=settings.kv_budget,
        batch_size=engines.batch_size,
        flash_attention="on" if engines.flash_attention == "auto" else engines.flash_attention,
        repack=engines.repack,
        mmap=engines.mmap,
        on_demand=processor_family is not None or can_forget(),
        residency="in-turns" if settings.residency == "in-turns" else "together",
        tiles_per_call=engines.tiles_per_call,
        vision_streams=engines.streams,
        processor_family=here if here in cost.REPACKED else "x86",
    )


def largest_picture(processor: ImageProcessor) -> tuple[int, int]:
    """Width and height of a photo with as many image tokens as any can have."""
    family = family_of(processor)
    sizes: Sequence[tuple[int, int]] = family.largest(processor)
    return max(sizes, key=lambda size: family.layout(size[0], size[1], processor).n_tokens)


def tiles_within(
    seconds: float,
    sizes: Sequence[tuple[int, int]],
    model: ModelSizes,
    settings: MachineSettings,
    engines: EngineSettings,
    speeds: Speeds | None,
) -> int:
    """The most tiles a picture with which the answer begins in ``seconds``, loading not counted.

    ``sizes`` are (width, height) of the pictures, ``speeds`` what ``edge-vlm tune`` measured.

    Raises:
        BudgetError: there are no speeds, or one tile a picture takes longer.
    """
    if speeds is None:
        raise BudgetError(
            "within: how fast this machine is was not measured; run 'edge-vlm tune' once"
        )
    most = model.processor.max_tiles
    request = request_settings(settings, engines)
    predicted = 0.0
    for tiles in range(min(most, settings.max_tiles or most), 0, -1):
        plans = [
            plan_request(model, *size, request, max_tiles=tiles, speeds=speeds) for size in sizes
        ]
        predicted = sum(plan.seconds.first_token for plan in plans if plan.seconds)
        if predicted <= seconds:
            _log.warning(
                "within %g s: %s, first token in about %.3g s", seconds, _tiles(tiles), predicted
            )
            return tiles
    raise BudgetError(
        f"within {seconds:g} s: even one tile a picture takes about {predicted:.3g} s"
    )


def _tiles(n: int | None) -> str:
    if n is None:
        return "all tiles"
    return f"at most {n} tile{'s' if n > 1 else ''} a picture"
