"""The portable vision graph in OpenVINO beside onnxruntime, tile by tile in turns.

    edge-vlm export CHECKPOINT --out ./portable --target portable
    python benchmarks/against_openvino.py ./portable

Without the package openvino it says so and does nothing. The result is
benchmarks/results/against_openvino.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from importlib.metadata import version

import numpy as np
from common import save

from edge_vlm.bench import machine, now, versions
from edge_vlm.bundle import VISION_NAME, Bundle
from edge_vlm.engine_settings import untuned
from edge_vlm.folders import find_bundle
from edge_vlm.vision import VisionTower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="folder or name of a bundle with a portable vision graph")
    parser.add_argument("--tiles", type=int, default=10)
    options = parser.parse_args()
    try:
        import openvino as ov
    except ImportError:
        print("skipped: openvino is not installed (pip install openvino)", file=sys.stderr)
        return
    bundle = Bundle.open(find_bundle(options.bundle))
    settings = bundle.manifest.image_processor
    shape = (1, settings.n_patches, settings.patch_values)
    crop = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    last = np.zeros(1, bool)
    engines = untuned()
    tower = VisionTower(bundle, engines)
    config = {"INFERENCE_NUM_THREADS": engines.vision_threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(str(bundle.path / VISION_NAME), "CPU", config)
    runs: dict[str, list[float]] = {"onnxruntime": [], "openvino": []}
    difference = 0.0
    for index in range(options.tiles + 1):
        started = time.perf_counter()
        ours = tower.encode_crops(crop, last)
        middle = time.perf_counter()
        theirs = compiled({"crops": crop, "is_last": last})["embeddings"]
        ended = time.perf_counter()
        difference = max(difference, float(np.abs(ours - theirs).max()))
        if index:  # the first run lays out memory
            runs["onnxruntime"].append(middle - started)
            runs["openvino"].append(ended - middle)
    medians = {name: statistics.median(values) for name, values in runs.items()}
    for name, seconds in medians.items():
        print(f"{name}: {seconds:.4g} s a tile", file=sys.stderr)
    save(
        "against_openvino",
        {
            "machine": machine(),
            "versions": {**versions(), "openvino": version("openvino")},
            "date": now(),
            "precision": bundle.manifest.vision.precision,
            "seconds_per_tile": medians,
            "largest_difference": difference,
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
