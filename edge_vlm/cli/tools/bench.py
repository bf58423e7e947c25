"""``edge-vlm bench``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from edge_vlm.cli.exporter import exporter
from edge_vlm.cli.options import (
    Parsed,
    engine_options,
    max_tiles_option,
    model_option,
    output_options,
)
from edge_vlm.cli.streams import write, write_json
from edge_vlm.cli.table import format_table

DEFAULT_SIZES = ((640, 480), (2728, 2046))
_SIZE = re.compile(r"(\d{1,5})[xX](\d{1,5})")
_ROWS = (  # name, label, unit, divisor
    ("crops", "crops", "", 1.0),
    ("image_tokens", "image tokens", "", 1.0),
    ("load_seconds", "load", "s", 1.0),
    ("vision_seconds_per_tile", "vision, a tile", "s", 1.0),
    ("vision_seconds", "vision", "s", 1.0),
    ("prefill_seconds", "prefill", "s", 1.0),
    ("prefill_tokens_per_second", "prefill", "tokens/s", 1.0),
    ("decode_tokens_per_second", "decode", "tokens/s", 1.0),
    ("first_token_seconds", "first token after", "s", 1.0),
    ("cold_first_token_seconds", "the same with loading", "s", 1.0),
    ("total_seconds", "whole answer after", "s", 1.0),
    ("peak_rss_bytes", "peak memory", "MB", 1e6),
    ("kv_bytes", "KV cache, allocated", "MB", 1e6),
    ("kv_bytes_in_use", "KV cache, in use", "MB", 1e6),
)


def _picture_size(text: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(text)
    if not match or not int(match[1]) or not int(match[2]):
        raise ValueError(f"{text!r} is not a size such as 2728x2046")
    return int(match[1]), int(match[2])


@click.command("bench")
@model_option
@click.option(
    "--synthetic",
    metavar="CONFIG",
    help="Measure random weights of this architecture instead, such as jina-vlm; they are made"
    " once (minutes) and kept in the cache. Needs the extra 'export'.",
)
@click.option(
    "--recipe", metavar="NAME", help="With --synthetic: how weights are stored (default laptop)."
)
@click.option(
    "--size",
    "sizes",
    type=Parsed("WxH", _picture_size),
    multiple=True,
    help="Size of the picture; may be repeated (default 640x480 and 2728x2046).",
)
@click.option("--runs", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option(
    "--tokens",
    type=click.IntRange(2, 4096),
    default=32,
    show_default=True,
    help="Length of the answer.",
)
@click.option(
    "--baseline",
    is_flag=True,
    help="Do the same, run by run in turns, with the defaults of llama.cpp and onnxruntime.",
)
@click.option(
    "--baseline-model",
    metavar="PATH_OR_NAME",
    help="Bundle for --baseline, for example with vision in fp32; by default the same.",
)
@max_tiles_option
@engine_options
@output_options
def command(
    model: str | None,
    synthetic: str | None,
    recipe: str | None,
    sizes: tuple[tuple[int, int], ...],
    runs: int,
    tokens: int,
    baseline: bool,
    baseline_model: str | None,
    max_tiles: int | None,
    as_json: bool,
    **engines: Any,
) -> None:
    """Measure load, vision, prefill, decode and memory on this machine.

    Each run is a process of its own; shown are medians, and the span of the runs in per cent. The
    picture is random noise: what is seen does not change how long it takes.

    \b
    edge-vlm bench
    edge-vlm bench --size 1920x1080 --residency in-turns
    edge-vlm bench --synthetic jina-vlm --recipe laptop --baseline
    """
    from edge_vlm.bundle.find import find_bundle
    from edge_vlm.cli.display import Steps
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.measure.bench import OWN, Variant, baseline_variant, bench

    if recipe and not synthetic:
        raise click.UsageError("--recipe goes with --synthetic")
    if baseline_model and not baseline:
        raise click.UsageError("--baseline-model goes with --baseline")
    settings = MachineSettings.from_environment(**engines)
    own = _synthetic(synthetic, recipe or "laptop") if synthetic else find_bundle(model)
    variants = [Variant(OWN, own, settings)]
    if baseline:
        other = find_bundle(baseline_model) if baseline_model else own
        variants.append(baseline_variant(other, settings))
    with Steps() as steps:
        report = bench(
            variants,
            sizes or DEFAULT_SIZES,
            runs=runs,
            tokens=tokens,
            max_tiles=max_tiles,
            progress=lambda done, total: steps.show("measuring", done, total),
        )
    if as_json:
        report["command"] = ["edge-vlm", *sys.argv[1:]]
        write_json(report)
    else:
        _show(report)


def _synthetic(config: str, recipe: str) -> Path:
    from edge_vlm.cli.display import Steps

    make = exporter("synthetic_bundle", "bench --synthetic")
    with Steps() as steps:
        found: Path = make(config, recipe, progress=steps.show)
        return found


def _show(report: dict[str, Any]) -> None:
    machine, results = report["machine"], report["results"]
    write(f"{machine['processor']}, {machine['cores']} cores, {machine['system']}")
    for name, result in results.items():
        settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
        precision = result["precision"]
        write(f"{name}: vision {precision['vision']}, decoder {precision['decoder']}")
        write(f"  {settings}")
    ratios = report.get("ratios", [])
    for index, summaries in enumerate(zip(*(r["sizes"] for r in results.values()), strict=True)):
        width, height = summaries[0]["size"]
        header = [f"{width}x{height}", *results, *["ratio" for _ in ratios[:1]]]
        rows = []
        for name, label, unit, divisor in _ROWS:
            row = [f"{label}{', ' + unit if unit else ''}"]
            row += [_cell(summary, name, divisor) for summary in summaries]
            row += [f"{r[name]:.2f}" if name in r else "" for r in ratios[index : index + 1]]
            rows.append(row)
        write(f"\n{format_table(header, rows)}")


def _cell(summary: dict[str, Any], name: str, divisor: float) -> str:
    median = summary["median"][name]
    text = f"{median / divisor:.4g}"
    span = summary["max"][name] - summary["min"][name]
    return f"{text} ±{span / 2 / median:.0%}" if span and median else text
