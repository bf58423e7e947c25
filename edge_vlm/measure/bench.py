"""Measures a bundle: every run in a process of its own, medians and spread over several runs."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.answering.trial import try_once
from edge_vlm.bundle.checksums import verify
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import InputError
from edge_vlm.machine.engine_settings import engine_defaults
from edge_vlm.machine.hardware import this_machine
from edge_vlm.measure.doctor import installed_packages
from edge_vlm.measure.worker import Worker
from edge_vlm.planning.tuning import engines_for, load_tuning

if TYPE_CHECKING:
    from edge_vlm.machine.settings import MachineSettings

OWN, BASELINE = "edge-vlm", "engines' defaults"
COMPARED = (
    "load_seconds",
    "vision_seconds_per_tile",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "first_token_seconds",
    "total_seconds",
    "peak_rss_bytes",
)
Progress = Callable[[int, int], None]  # runs done, runs in total


@dataclass(frozen=True)
class Variant:
    """A bundle with settings; under the name ``OWN`` as ``EdgeVLM.load`` runs it, perhaps tuned."""

    name: str
    model: Path
    settings: MachineSettings


def baseline_variant(model: Path, settings: MachineSettings) -> Variant:
    """A bundle as llama.cpp and onnxruntime run it when they are told nothing.

    Logits are computed for one position alone also here, where llama.cpp has them for all.
    """
    changes: dict[str, Any] = {**asdict(engine_defaults()), "residency": "together"}
    return Variant(BASELINE, model, replace(settings, kv_type="f16", **changes))


def bench(
    variants: Sequence[Variant],
    sizes: Sequence[tuple[int, int]],
    *,
    runs: int = 3,
    tokens: int = 32,
    max_tiles: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer a question about a random picture of each size (width, height), ``runs`` times.

    The variants take turns, so that what else the machine does falls on all of them.

    Returns:
        For JSON: machine, versions, and for each variant and size the runs and of each number the
        median, smallest and largest. Seconds, bytes, tokens per second.

    Raises:
        InputError: two tokens at least are needed for their rate.
        EdgeVLMError: a run failed.
    """
    if tokens < 2:
        raise InputError("tokens: two at least are needed to measure their rate")
    for variant in variants:
        bundle = Bundle.open(variant.model)  # hashed and tried once, outside of what is measured
        verify(bundle)
        tuning = load_tuning(bundle.manifest)
        try_once(bundle, variant.settings, engines_for(bundle.manifest, variant.settings, tuning))
    found: dict[str, list[list[dict[str, Any]]]] = {v.name: [[] for _ in sizes] for v in variants}
    report_done = progress or (lambda _done, _total: None)
    rounds = list(product(range(len(sizes)), range(runs), variants))
    for done, (index, _, variant) in enumerate(rounds):
        report_done(done, len(rounds))
        found[variant.name][index].append(_run(variant, sizes[index], tokens, max_tiles))
    report_done(len(rounds), len(rounds))
    results: dict[str, dict[str, Any]] = {
        variant.name: {
            **_description(variant),
            "sizes": [
                {"size": size, **_summary(records)}
                for size, records in zip(sizes, found[variant.name], strict=True)
            ],
        }
        for variant in variants
    }
    report: dict[str, Any] = {**circumstances(), "results": results}
    if len(variants) > 1:
        report["ratios"] = _ratios(*(results[v.name]["sizes"] for v in variants[:2]))
    return report


def _run(
    variant: Variant, size: tuple[int, int], tokens: int, max_tiles: int | None
) -> dict[str, Any]:
    with Worker() as worker:
        return worker.measure(
            "answer",
            model=str(variant.model),
            settings=asdict(variant.settings) | {"cache": None, "trust_bundle": True},
            size=size,
            tokens=tokens,
            max_tiles=max_tiles,
        )


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = {name: [record[name] for record in records] for name in records[0]}
    return {
        "median": {name: statistics.median(values) for name, values in numbers.items()},
        "min": {name: min(values) for name, values in numbers.items()},
        "max": {name: max(values) for name, values in numbers.items()},
        "runs": records,
    }


def _ratios(own: Any, other: Any) -> list[dict[str, Any]]:
    """Of the medians, the first variant's to the second's."""
    return [
        {"size": a["size"], **{name: a["median"][name] / b["median"][name] for name in COMPARED}}
        for a, b in zip(own, other, strict=True)
    ]


def _description(variant: Variant) -> dict[str, Any]:
    manifest = Bundle.open(variant.model).manifest
    tuning = load_tuning(manifest)
    return {
        "model": variant.model.name,
        "precision": {
            "vision": manifest.vision.precision,
            "decoder": manifest.decoder.precision,
        },
        "settings": {
            **asdict(engines_for(manifest, variant.settings, tuning)),
            "kv_type": variant.settings.kv_type,
            "residency": variant.settings.residency,
            "tuned": tuning is not None and variant.name == OWN,
        },
    }


def circumstances() -> dict[str, Any]:
    """Of a measurement: machine, versions and date."""
    here = this_machine()
    machine = {
        "system": platform.system(),
        "processor": here.processor,
        "architecture": here.architecture,
        "cores": here.usable_cores,
        "memory": here.memory,
    }
    return {"machine": machine, "versions": versions(), "date": now()}


def versions() -> dict[str, str]:
    """Of what was measured; builds of engines for accelerators have other names: "unknown"."""
    names = ("edge-vlm", "llama-cpp-python", "onnxruntime", "numpy")
    found = dict.fromkeys(names, "unknown") | installed_packages(names)
    return {"python": platform.python_version(), **found}


def now() -> str:
    """ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
