"""What it brings and costs that llama.cpp's threads wait actively for each other.

    python benchmarks/waiting.py BUNDLE

In one process, in turns: always active ("patient"), never ("impatient"), and as edge-vlm decides,
on a quiet machine and beside a loop that keeps a core busy. Speeds are ratios to "impatient" of the
same round. edge_vlm/decoder/waiting.py says why. The result is benchmarks/results/waiting.json.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from typing import Any

import numpy as np
from beside_other_programs import busy
from common import save

from edge_vlm.bundle.find import find_bundle
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.decoder.decoder import LlamaDecoder
from edge_vlm.decoder.waiting import Patience
from edge_vlm.measure.bench import circumstances

POSITIONS = 512
WAYS = ("impatient", "patient", "decided")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="folder or name of a bundle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    bundle = Bundle.open(find_bundle(options.bundle))
    width = bundle.manifest.decoder.hidden_size
    rows = np.random.default_rng(0).normal(0, 0.02, (POSITIONS, width)).astype(np.float32)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    with contextlib.closing(LlamaDecoder(bundle)) as decoder:
        work(decoder, rows, 2)  # the weights' first use
        for _ in range(options.rounds):
            for state, n_cores in (("quiet", 0), ("one core busy", 1)):
                with busy(n_cores):
                    time.sleep(0.5)
                    speeds = {}
                    for way in WAYS:
                        decide(way)
                        speeds[way] = work(decoder, rows, options.tokens)
                for way, speed in speeds.items():
                    for key, value in speed.items():
                        ratio = value / speeds["impatient"][key]
                        found.setdefault(state, {}).setdefault(way, {}).setdefault(key, []).append(
                            ratio
                        )
    medians = {
        state: {
            way: {key: statistics.median(ratios) for key, ratios in speed.items()}
            for way, speed in ways.items()
        }
        for state, ways in found.items()
    }
    for state, ways in medians.items():
        for way, speed in ways.items():
            words = ", ".join(f"{key} {value:.2f}" for key, value in speed.items())
            print(f"{state}, {way}: {words}", file=sys.stderr)
    save("waiting", {**circumstances(), "medians": medians, "ratios": found})


def work(decoder: LlamaDecoder, rows: Any, n_tokens: int) -> dict[str, float]:
    """Positions and tokens a second."""
    with decoder.working(), decoder.context(len(rows) + n_tokens) as context:
        started = time.perf_counter()
        context.append_embeddings(rows, logits=True)
        context.settle()
        prefilled = time.perf_counter()
        for index in range(n_tokens):
            context.append_tokens([100 + index], logits=True)
        ended = time.perf_counter()
    return {"prefill": len(rows) / (prefilled - started), "decode": n_tokens / (ended - prefilled)}


def decide(way: str, own: Any = Patience.set_patient) -> None:
    """Let every decision be the same, or leave it to edge-vlm."""

    def always(patience: Patience, patient: bool, n_threads: int) -> None:
        own(patience, way == "patient", n_threads)

    # The decisions are what is measured, and edge-vlm offers no way to overrule them.
    Patience.set_patient = own if way == "decided" else always  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
