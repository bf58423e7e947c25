"""What `edge-vlm plan` predicts beside what is measured, for pictures of several sizes.

    edge-vlm tune --model BUNDLE
    python benchmarks/planner.py BUNDLE

Tokens and the KV cache have to be the same; memory and seconds are predicted, the latter from the
speeds `edge-vlm tune` found. The result is benchmarks/results/planner.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from common import bench, save

from edge_vlm.bundle.find import find_bundle
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.planning.limits import request_settings
from edge_vlm.planning.request import ModelSizes, plan_request
from edge_vlm.planning.tuning import engines_for, load_tuning

SIZES = ("378x378", "640x480", "800x800", "1920x1080", "1080x1920", "2000x700", "2728x2046")
TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="folder or name of a bundle")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WIDTHxHEIGHT")
    parser.add_argument("--runs", default="2")
    options = parser.parse_args()
    bundle = Bundle.open(find_bundle(options.bundle))
    tuning = load_tuning(bundle.manifest)
    if tuning is None:
        sys.exit("run 'edge-vlm tune' for this bundle first")
    settings = MachineSettings.from_environment()
    engines = engines_for(bundle.manifest, settings, tuning)
    sizes = [word for size in options.sizes for word in ("--size", size)]
    report = bench(
        "edge-vlm",
        *("--model", str(bundle.path), "--runs", options.runs, "--tokens", str(TOKENS)),
        *sizes,
    )
    (result,) = report.pop("results").values()
    rows = []
    for entry in result["sizes"]:
        found = entry["median"]
        request = replace(
            request_settings(settings, engines),
            question_tokens=round(found["prompt_tokens"] - found["image_tokens"]),
            answer_tokens=TOKENS,
        )
        plan = plan_request(
            ModelSizes.of(bundle.manifest), *entry["size"], request, speeds=tuning.speeds
        )
        if plan.seconds is None:
            sys.exit("the tuning holds no speeds")
        planned = {
            "image_tokens": plan.image.image_tokens,
            "kv_bytes": plan.memory.kv_cache,
            "peak_rss_bytes": plan.memory.peak,
            "first_token_seconds": plan.seconds.first_token,
        }
        cases = _both(planned, found)
        rows.append({"size": entry["size"], "crops": found["crops"], "cases": cases})
        words = ", ".join(
            f"{name} {case['planned']:.6g} for {case['measured']:.6g}"
            for name, case in cases.items()
        )
        print(f"{entry['size'][0]}x{entry['size'][1]}: {words}", file=sys.stderr)
    save("planner", {**report, "rows": rows})


def _both(planned: dict[str, float], found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: {"planned": value, "measured": found[name]} for name, value in planned.items()}


if __name__ == "__main__":
    main()
