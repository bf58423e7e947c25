"""OpenVINO beside edge-vlm: the portable vision graph, and OpenVINO GenAI with the same decoder.

    edge-vlm export CHECKPOINT --out portable --target portable --vision int8-static \\
        --calibrate builtin --static-shapes
    python benchmarks/against_openvino.py laptop --portable portable

Every measurement is a process of its own, and the two take turns. Without the package openvino it
says so and does nothing; without openvino-genai, which reads the same decoder.gguf and converts it
to its own format, the decoder is left out. OpenVINO has no program that puts the two together: its
time to the first token is the sum of vision and prefill. The result is
benchmarks/results/against_openvino.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
from common import child, medians, save

from edge_vlm.bundle.find import find_bundle
from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Bundle
from edge_vlm.machine.memory import peak_rss_bytes
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.measure.bench import circumstances
from edge_vlm.measure.worker import Worker
from edge_vlm.planning.tuning import engines_for, load_tuning

OWN, OTHER = "edge-vlm", "OpenVINO"
CROPS, PROMPT, ANSWER = 13, 1766, 32  # what a question about a picture of twelve tiles takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", help="folder or name of a bundle")
    parser.add_argument("--portable", help="bundle whose vision graph OpenVINO runs; the same")
    parser.add_argument("--tiles", type=int, default=4, help="in a measurement")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of OpenVINO; its default is all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_openvino(**json.loads(options.child))))
        return
    if importlib.util.find_spec("openvino") is None:
        print("skipped: openvino is not installed (pip install openvino)", file=sys.stderr)
        return
    genai = importlib.util.find_spec("openvino_genai") is not None
    bundle = Bundle.open(find_bundle(options.bundle))
    portable = Bundle.open(find_bundle(options.portable or options.bundle))
    processor = portable.manifest.image_processor
    prompt = min(options.prompt, bundle.manifest.decoder.max_sequence_length - ANSWER)
    request = {
        "graph": str(portable.path / VISION_NAME),
        "shape": [1, processor.n_patches, processor.patch_values],
        "tiles": options.tiles,
        "decoder": str(bundle.path / DECODER_NAME) if genai else None,
        "n_ids": bundle.manifest.decoder.vocab_size,
        "prompt": prompt,
        "threads": options.threads,
    }
    runs: dict[str, list[dict[str, float]]] = {OWN: [], OTHER: []}
    for _ in range(options.rounds):
        runs[OWN].append(_own(bundle, options.tiles, prompt, genai))
        runs[OTHER].append(child(request))
    middle = medians(runs)
    for name, values in middle.items():
        words = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(f"{name}: {words}", file=sys.stderr)
    packages = ("openvino", "openvino-genai") if genai else ("openvino",)
    report = circumstances()
    report["versions"] |= {name: version(name) for name in packages}
    save(
        "against_openvino",
        {
            **report,
            "precisions": {
                OWN: [bundle.manifest.vision.precision, bundle.manifest.decoder.precision],
                OTHER: [portable.manifest.vision.precision, "made of the same GGUF"],
            },
            "medians": middle,
            "runs": runs,
        },
    )


def _own(bundle: Bundle, tiles: int, prompt: int, decoder: bool) -> dict[str, float]:
    tuning = load_tuning(bundle.manifest)
    engines = asdict(engines_for(bundle.manifest, MachineSettings(), tuning))
    with Worker() as worker:
        seen = worker.measure("vision", model=str(bundle.path), engines=engines, crops=tiles)
    found = {"vision_seconds_per_tile": seen["vision"] / tiles}
    if decoder:
        with Worker() as worker:
            told = worker.measure(
                "decoder",
                model=str(bundle.path),
                engines=engines,
                kv_type="f16",
                prompt=prompt,
                answer=ANSWER,
            )
        found |= _rates(found, told["prefill"], prompt, told["decode"] / ANSWER)
    return found


def _rates(
    found: dict[str, float], prefill: float, prompt: int, per_token: float
) -> dict[str, float]:
    return {
        "prefill_tokens_per_second": prompt / prefill,
        "decode_tokens_per_second": 1 / per_token,
        "first_token_seconds": CROPS * found["vision_seconds_per_tile"] + prefill,
    }


def _openvino(
    *,
    graph: str,
    shape: list[int],
    tiles: int,
    decoder: str | None,
    n_ids: int,
    prompt: int,
    threads: int,
) -> dict[str, float]:
    import openvino as ov

    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    crop = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    inputs = {"crops": crop, "is_last": np.zeros(1, bool)}
    compiled = ov.Core().compile_model(graph, "CPU", config)
    compiled(inputs)  # memory is laid out in the first run
    started = time.perf_counter()
    for _ in range(tiles):
        compiled(inputs)
    found = {"vision_seconds_per_tile": (time.perf_counter() - started) / tiles}
    del compiled
    if decoder:
        import openvino_genai

        pipeline = openvino_genai.LLMPipeline(decoder, "CPU", **config)
        ids = np.array([[(7 + 13 * i) % n_ids for i in range(prompt)]], np.int64)
        pipeline.generate(ov.Tensor(ids[:, :8]), max_new_tokens=2, ignore_eos=True)
        result = pipeline.generate(ov.Tensor(ids), max_new_tokens=ANSWER + 1, ignore_eos=True)
        metrics = result.perf_metrics
        prefill, per_token = metrics.get_ttft().mean / 1000, metrics.get_tpot().mean / 1000
        found |= _rates(found, prefill, prompt, per_token)
    found["peak_rss_bytes"] = peak_rss_bytes()
    return found


if __name__ == "__main__":
    main()
