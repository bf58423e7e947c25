"""Quality against size and speed over the precisions of the demo model.

    python benchmarks/quantizations.py --per-family 100

Each pair of precisions is exported from models/demo/checkpoint, answers the same held-out
questions, and is measured with ``edge-vlm bench``. Needs the extra 'export' and the fonts of the
demo model. The result is benchmarks/results/quantizations.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from common import bench, save
from edge_vlm_export import export_checkpoint

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.demo.evaluate import BundleAnswerer, evaluate, held_out  # noqa: E402

CHECKPOINT = ROOT / "models/demo/checkpoint"
VISION = ("fp32", "fp16", "int8", "int8-static", "int4")
DECODER = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-family", type=int, default=50, help="questions of each kind")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--vision", nargs="+", default=VISION, choices=VISION)
    parser.add_argument("--decoder", nargs="+", default=DECODER, choices=DECODER)
    options = parser.parse_args()
    pairs = [(vision, "f16") for vision in options.vision]
    pairs += [("fp16", decoder) for decoder in options.decoder if decoder != "f16"]
    with tempfile.TemporaryDirectory(prefix="quantizations-") as scratch:
        bundles = {
            f"{vision} {decoder}": export_checkpoint(
                CHECKPOINT, Path(scratch) / f"{vision}-{decoder}", vision=vision, decoder=decoder
            )
            for vision, decoder in dict.fromkeys(pairs)
        }
        answerers = {name: BundleAnswerer(str(path)) for name, path in bundles.items()}
        scores = evaluate(answerers, held_out(options.per_family))
        points = []
        report = {}
        for name, path in bundles.items():
            report = bench(
                "edge-vlm", "--model", str(path), "--size", "640x480", "--runs", str(options.runs)
            )
            (result,) = report["results"].values()
            overall = scores[name].overall
            points.append(
                {
                    "name": name,
                    "bytes": sum(file.stat().st_size for file in path.iterdir()),
                    "right": overall.right,
                    "questions": overall.number,
                    **result["sizes"][0]["median"],
                }
            )
            print(f"{name}: {overall.text()}", file=sys.stderr)
    save(
        "quantizations",
        {**{k: report[k] for k in ("machine", "versions", "date")}, "points": points},
    )


if __name__ == "__main__":
    main()
