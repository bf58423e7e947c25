"""benchmarks/RESULTS.md and its plots from benchmarks/results/*.json.

    python benchmarks/render.py

Needs matplotlib (extra 'dev'). A result that was not measured is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS

HERE = Path(__file__).parent
HEAD = """# Results

Written by `benchmarks/render.py` from `benchmarks/results/`; each table names the command that
measures it. Medians; compare numbers of one table, not of two.

Full-size bundles hold random weights, as time and memory depend on sizes alone:

    edge-vlm-export synthesize --config jina-vlm --out checkpoint
    edge-vlm export checkpoint --out laptop --recipe laptop --allow-loss
    edge-vlm export checkpoint --out pi-4gb --recipe pi-4gb --allow-loss
    edge-vlm export checkpoint --out fp32-q4km --vision fp32 --decoder q4_k_m --allow-loss
    edge-vlm export checkpoint --out portable --vision int8-static --calibrate builtin \\
        --target portable --static-shapes --allow-loss
"""
Result = dict[str, Any]
MEASURES = (
    ("vision_seconds_per_tile", "vision, s a tile", 1.0),
    ("prefill_tokens_per_second", "prefill, tokens/s", 1.0),
    ("decode_tokens_per_second", "decode, tokens/s", 1.0),
    ("first_token_seconds", "first token after, s", 1.0),
    ("peak_rss_bytes", "peak memory, MB", 1e6),
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


def against_defaults(result: Result) -> str:
    """edge-vlm, the engines' defaults, and the ratio."""
    parts = []
    names = list(result["results"])
    for index, ratios in enumerate(result["ratios"]):
        width, height = ratios["size"]
        medians = [result["results"][name]["sizes"][index]["median"] for name in names]
        rows = [
            [
                label,
                *(number(median[key] / divisor) for median in medians),
                f"{ratios[key]:.2f}",
            ]
            for key, label, divisor in MEASURES
        ]
        crops, tokens = (number(medians[0][key]) for key in ("crops", "image_tokens"))
        parts.append(
            f"{width}x{height}: {crops} crops, {tokens} image tokens\n\n"
            + table(["", *names, "ratio"], rows)
        )
    for name in names:
        precision = result["results"][name]["precision"]
        parts.append(f"{name}: vision {precision['vision']}, decoder {precision['decoder']}.")
    return "\n\n".join(parts)


def against_pytorch(result: Result) -> str:
    """Each with the ratio of edge-vlm to it."""
    medians = result["medians"]
    own = medians["edge-vlm"]["first_token_seconds"]
    rows = [
        [
            name,
            *(number(values[key] / divisor) for key, _, divisor in MEASURES),
            f"{own / values['first_token_seconds']:.2f}",
        ]
        for name, values in medians.items()
    ]
    return table(["", *(label for _, label, _ in MEASURES), "edge-vlm's time to its"], rows)


def against_openvino(result: Result) -> str:
    """Both, and the ratio."""
    medians = result["medians"]
    own, other = medians.values()
    rows = [
        [
            label,
            number(own[key] / divisor),
            number(other[key] / divisor),
            f"{own[key] / other[key]:.2f}",
        ]
        for key, label, divisor in MEASURES
        if key in own
    ]
    told = "; ".join(
        f"{name}: vision {vision}, decoder {decoder}"
        for name, (vision, decoder) in result["precisions"].items()
    )
    memory = f"OpenVINO's peak memory: {number(other['peak_rss_bytes'] / 1e6)} MB."
    return f"{told}. {memory}\n\n{table(['', *medians, 'ratio'], rows)}"


def beside_other_programs(result: Result) -> str:
    """Part of the quiet speed that is left."""
    rows = [
        [name, *(f"{value:.0%}" for value in values.values())]
        for name, values in result["kept"].items()
    ]
    return table(["part of the quiet speed", "vision", "prefill", "decode"], rows)


def decoder(result: Result) -> str:
    """Both decoders, and the median of the rounds' ratios."""
    rows = [
        [
            f"{key}, tokens/s",
            *(number(values[key]) for values in result["medians"].values()),
            f"{ratio:.2f}",
        ]
        for key, ratio in result["ratios"].items()
    ]
    told = f"{result['positions']} positions, then {result['tokens']} tokens; "
    told += f"{len(result['rounds'])} rounds in turns, the median of their ratios."
    return f"{told}\n\n{table(['', *result['medians'], 'ratio'], rows)}"


def waiting(result: Result) -> str:
    """Ratios to threads that sleep at once."""
    rows = [
        [state, way, *(f"{value:.2f}" for value in speed.values())]
        for state, ways in result["medians"].items()
        for way, speed in ways.items()
        if way != "impatient"
    ]
    return (
        "Speed, relative to threads that sleep at once: threads that always wait actively"
        ' ("patient"), and edge-vlm ("decided").\n\n'
        + table(["machine", "threads are", "prefill", "decode"], rows)
    )


def tiles(result: Result) -> str:
    """Cost by number of crops, and a plot of it."""
    points = result["points"]
    keys = (
        ("crops", "crops", 1.0),
        ("image_tokens", "image tokens", 1.0),
        ("vision_seconds", "vision, s", 1.0),
        ("prefill_seconds", "prefill, s", 1.0),
        ("first_token_seconds", "first token after, s", 1.0),
        ("peak_rss_bytes", "peak memory, MB", 1e6),
    )
    rows = [[number(point[key] / divisor) for key, _, divisor in keys] for point in points]
    crops = [point["crops"] for point in points]

    def draw(axes: Any) -> None:
        axes.stackplot(
            crops,
            [point["vision_seconds"] for point in points],
            [point["prefill_seconds"] for point in points],
            labels=["vision", "prefill"],
        )
        axes.set(xlabel="crops, the thumbnail included", ylabel="seconds")
        axes.legend(loc="upper left")

    return f"{table([label for _, label, _ in keys], rows)}\n\n{plot('tiles', draw)}"


def quantizations(result: Result) -> str:
    """Right answers by size, and a plot of it."""
    points = sorted(result["points"], key=lambda point: point["bytes"])
    rows = [
        [
            point["name"],
            number(point["bytes"] / 1e6),
            f"{point['right'] / point['questions']:.1%}",
            number(point["vision_seconds_per_tile"]),
            number(point["prefill_tokens_per_second"]),
            number(point["decode_tokens_per_second"]),
        ]
        for point in points
    ]
    header = ["vision, decoder", "MB", "right", "s a tile", "prefill, /s", "decode, /s"]

    def draw(axes: Any) -> None:
        for point in points:
            share = 100 * point["right"] / point["questions"]
            axes.plot(point["bytes"] / 1e6, share, "o")
            axes.annotate(point["name"], (point["bytes"] / 1e6, share), fontsize=7)
        axes.set(xlabel="bundle, MB", ylabel="right answers, %")

    questions = points[0]["questions"]
    return (
        f"{questions} held-out questions to the demo model.\n\n{table(header, rows)}\n\n"
        f"{plot('quantizations', draw)}"
    )


def agreement(result: Result) -> str:
    """Tokens that are the same."""
    rows = [
        [
            row["name"],
            f"{row['same_tokens'] / row['tokens']:.2%}",
            f"{row['same_answers']} of {result['questions']}",
        ]
        for row in result["rows"]
    ]
    return table(["setting", "tokens that agree", "same answers"], rows)


def planner(result: Result) -> str:
    """Predicted and measured, and the largest error of each number."""
    parts = (
        ("image_tokens", "image tokens", 1.0),
        ("kv_bytes", "KV cache, MB", 1e6),
        ("peak_rss_bytes", "peak memory, MB", 1e6),
        ("first_token_seconds", "first token after, s", 1.0),
    )
    rows, errors = [], {key: 0.0 for key, _, _ in parts}
    for row in result["rows"]:
        cells = ["x".join(map(str, row["size"])), number(row["crops"])]
        for key, _, divisor in parts:
            planned, measured = row["cases"][key]["planned"], row["cases"][key]["measured"]
            cells.append(f"{number(planned / divisor)} / {number(measured / divisor)}")
            errors[key] = max(errors[key], abs(planned / measured - 1))
        rows.append(cells)
    rows.append(["largest error", "", *(f"{error:.1%}" for error in errors.values())])
    return "Planned / measured.\n\n" + table(["", "crops", *(p[1] for p in parts)], rows)


def kv_cache(result: Result) -> str:
    """Held and computed."""
    rows = [
        [row["kv_type"], number(row["held"] / 1e6), number(row["computed"] / 1e6)]
        for row in result["rows"]
    ]
    header = ["type", "llama.cpp holds, MB", "computed, MB"]
    return f"{result['positions']} positions.\n\n" + table(header, rows)


def plot(name: str, draw: Callable[[Any], None]) -> str:
    """Write plots/NAME.png and return the line that shows it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (HERE / "plots").mkdir(exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "plots" / f"{name}.png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return f"![{name}](plots/{name}.png)"


SECTIONS: tuple[tuple[str, str, Callable[[Result], str]], ...] = (
    ("against_defaults", "Against the engines' defaults", against_defaults),
    ("decoder", "The decoder alone, against llama.cpp's defaults", decoder),
    ("beside_other_programs", "Beside another program", beside_other_programs),
    ("waiting", "How threads wait for each other", waiting),
    ("against_pytorch", "Against PyTorch", against_pytorch),
    ("against_openvino", "Against OpenVINO", against_openvino),
    ("planner", "Planned and measured", planner),
    ("kv_cache", "KV cache", kv_cache),
    ("tiles", "As the tiles grow", tiles),
    ("quantizations", "Quality against size and speed", quantizations),
    ("agreement", "Answers under other settings", agreement),
)


def main() -> None:
    parts = [HEAD]
    for name, title, section in SECTIONS:
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text("utf-8"))
        machine = result["machine"]
        versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
        parts.append(
            f"## {title}\n\n{section(result)}\n\n`{result['command']}`\n\n{result['date']},"
            f" {machine['processor']}, {machine['cores']} cores, {machine['system']}; {versions}.\n"
        )
    (HERE / "RESULTS.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
