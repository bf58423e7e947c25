"""The decoder alone: edge-vlm's settings beside llama.cpp's defaults, on the same GGUF.

    python benchmarks/decoder.py BUNDLE

Two processes hold a decoder each and prefill and decode in turns. Less happens between two numbers
of a ratio than in ``against_defaults.py``, which matters where a machine's speed varies by the
minute. A ratio is that of one round, the result their median. It is written to
benchmarks/results/decoder.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict

from common import medians, save

from edge_vlm.bundle.find import find_bundle
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.machine.engine_settings import engine_defaults
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.measure.bench import circumstances
from edge_vlm.measure.worker import Worker
from edge_vlm.planning.tuning import engines_for

DEFAULTS = "llama.cpp's defaults"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="folder or name of a bundle")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--positions", type=int, default=1766, help="of the prompt")
    parser.add_argument("--tokens", type=int, default=48, help="decoded behind it")
    options = parser.parse_args()
    bundle = Bundle.open(find_bundle(options.bundle))
    own = engines_for(bundle.manifest, MachineSettings())
    settings = {"edge-vlm": own, DEFAULTS: engine_defaults()}
    counts = {"prefill": options.positions, "decode": options.tokens}
    speeds: list[dict[str, dict[str, float]]] = []
    with Worker() as ours, Worker() as theirs:
        for number in range(options.rounds):
            found = {}
            for (name, engines), worker in zip(settings.items(), (ours, theirs), strict=True):
                seconds = worker.measure(
                    "decoder",
                    model=str(bundle.path),
                    engines=asdict(engines),
                    kv_type="f16",
                    prompt=options.positions,
                    answer=options.tokens,
                )
                found[name] = {key: count / seconds[key] for key, count in counts.items()}
            speeds.append(found)
            words = ", ".join(
                f"{key} {found['edge-vlm'][key]:.1f} and {found[DEFAULTS][key]:.1f}"
                for key in counts
            )
            print(f"round {number + 1}: {words} tokens/s", file=sys.stderr)
    ratios = {
        key: statistics.median(found["edge-vlm"][key] / found[DEFAULTS][key] for found in speeds)
        for key in counts
    }
    middle = medians({name: [found[name] for found in speeds] for name in settings})
    print(", ".join(f"{key} x{ratio:.2f}" for key, ratio in ratios.items()), file=sys.stderr)
    report = {"positions": options.positions, "tokens": options.tokens, "rounds": speeds}
    save("decoder", {**circumstances(), **report, "medians": middle, "ratios": ratios})


if __name__ == "__main__":
    main()
