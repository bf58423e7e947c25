"""Seconds a tile of the vision tower takes in each precision, at full size, without its weights.

    python benchmarks/vision_speed.py                    # 25 blocks, about 4 GB of memory
    python benchmarks/vision_speed.py --layers 4         # shorter; the ratios hardly change
    python benchmarks/vision_speed.py --against torch.onnx  # also a graph from vision_torch.py

Weights are random, drawn tensor by tensor while a graph is written: time depends on sizes, not on
values. The variants run in turns, so that whatever else the machine does falls on all of them
alike; a speed is the median over rounds of (time of the fp32 cpu graph) / (time of the variant).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32, Tensor
from edge_vlm_export.families.opened import Description, Model
from edge_vlm_export.graph.onnx_graph import EXTERNAL_DATA_BYTES
from edge_vlm_export.graph.precision import Range, Recipe
from edge_vlm_export.synthetic.checkpoint import config_folder, random_values
from edge_vlm_export.vision.assembly import build_vision

from edge_vlm.machine.process import import_onnxruntime

ort = import_onnxruntime()
BASE = "fp32 cpu"


class RandomTensor(Tensor):
    """Values from a generator instead of a file."""

    model: Description

    def rows(self, start: int, stop: int) -> Float32:
        row = (stop - start, *self.shape[1:])
        return np.concatenate(list(random_values(self.name, row, self.model, 0))).reshape(row)


class RandomModel(Model):
    """The released sizes, with ``n_layers`` blocks if given; its graph adds no rows."""

    def __init__(self, n_layers: int | None) -> None:
        Description.__init__(self, config_folder("jina-vlm"))
        if n_layers is not None:
            used = [n_layers - 1, max(0, n_layers - 7)]
            vision = self.settings.vision.model_copy(
                update={"n_layers": n_layers, "vit_layers": used}
            )
            self.settings = replace(self.settings, vision=vision)
        RandomTensor.model = self
        where = Path("random")
        self.tensors = Checkpoint(
            {name: RandomTensor(name, "BF16", s, where, 0) for name, s in self.shapes().items()},
            where,
        )

    def added_row(self) -> None:
        return None

    def markers(self) -> None:
        return None


def variants(model: Model) -> dict[str, Recipe]:
    """What is compared, fastest last."""
    # The scale of an input does not change the time; calibration would find about this.
    ranges = dict.fromkeys(model.tower.products, Range(-6, 6))
    return {
        BASE: Recipe("fp32", "cpu"),
        "fp32 portable": Recipe("fp32", "portable"),
        "int4 cpu": Recipe("int4", "cpu"),
        "int8 portable": Recipe("int8", "portable"),
        "int8-static portable": Recipe("int8-static", "portable", ranges=ranges),
        "int8 cpu": Recipe("int8", "cpu"),
        "int8-static cpu": Recipe("int8-static", "cpu", ranges=ranges),
    }


def load(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="blocks to run; 25 are used in the released one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", action="append", help="a variant, besides fp32 cpu; repeatable")
    parser.add_argument("--against", type=Path, help="another graph with the same inputs")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    arguments = parser.parse_args()

    model = RandomModel(arguments.layers)
    chosen = variants(model)
    if arguments.only:
        unknown = set(arguments.only) - set(chosen)
        if unknown:
            parser.error(f"no variant {sorted(unknown)}; there are: {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in chosen if name in {BASE, *arguments.only}}

    crops = np.random.default_rng(0).uniform(-1, 1, (1, *model.tower.crop_shape))
    feed: dict[str, Any] = {"crops": crops.astype(np.float32), "is_last": np.array([True])}
    sessions: dict[str, ort.InferenceSession] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, recipe) in enumerate(chosen.items()):
            print(f"writing {name}", file=sys.stderr)
            path = Path(folder) / f"{index}.onnx"
            graph = build_vision(model, recipe)
            files = graph.save(path, EXTERNAL_DATA_BYTES, lambda n_bytes: None, "benchmark")
            sizes[name] = sum(file.stat().st_size for file in files)
            sessions[name] = load(path, arguments.threads)
        if arguments.against:
            name = arguments.against.stem
            sessions[name] = load(arguments.against, arguments.threads)
            parts = arguments.against.parent.glob(f"{arguments.against.name}*")
            sizes[name] = sum(part.stat().st_size for part in parts)

        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for number in range(arguments.rounds + 1):
            print(f"round {number} of {arguments.rounds}", file=sys.stderr)
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run([session.get_outputs()[0].name], feed)
                if number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
        sessions.clear()

    rows = {}
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds[BASE], times, strict=True)]
        rows[name] = {
            "seconds_median": statistics.median(times),
            "seconds_min": min(times),
            "speed": statistics.median(ratios),
            "megabytes": sizes[name] / 1e6,
        }
    vision = model.settings.vision
    print(
        f"{vision.n_used_layers} blocks of width {vision.hidden_size} and the connector,"
        f" one tile, {arguments.threads} threads"
    )
    print(f"{'':22}{'median s':>10}{'best s':>10}{'speed':>8}{'MB':>8}")
    for name, row in rows.items():
        print(
            f"{name:22}{row['seconds_median']:10.3f}{row['seconds_min']:10.3f}"
            f"{row['speed']:8.2f}{row['megabytes']:8.0f}"
        )
    if arguments.json:
        result = {
            "layers": model.settings.vision.n_used_layers,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "onnxruntime": ort.__version__,
            "variants": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
