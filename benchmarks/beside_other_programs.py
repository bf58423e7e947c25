"""How much speed is left when another program keeps one core busy.

    python benchmarks/beside_other_programs.py --synthetic jina-vlm --size 2728x2046

Arguments are those of ``edge-vlm bench``. Quiet and busy runs take turns, edge-vlm and the engines'
defaults too. The result is benchmarks/results/beside_other_programs.json.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from common import bench, save

NAMES = ("vision_seconds_per_tile", "prefill_tokens_per_second", "decode_tokens_per_second")


@contextlib.contextmanager
def busy(n_cores: int) -> Iterator[None]:
    """Loops that do nothing else."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_cores)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy-cores", type=int, default=1)
    options, arguments = parser.parse_known_args()
    speeds: dict[str, dict[str, list[dict[str, Any]]]] = {}
    report: dict[str, Any] = {}
    for _ in range(options.rounds):
        for state, n_cores in (("quiet", 0), ("busy", options.busy_cores)):
            with busy(n_cores):
                report = bench("edge-vlm", "--baseline", "--runs", "1", *arguments)
            for name, result in report["results"].items():
                speeds.setdefault(name, {}).setdefault(state, []).append(
                    result["sizes"][0]["median"]
                )
    kept = {name: {key: _kept(states, key) for key in NAMES} for name, states in speeds.items()}
    for name, values in kept.items():
        words = ", ".join(f"{key} {value:.0%}" for key, value in values.items())
        print(f"{name} keeps: {words}", file=sys.stderr)
    report = {key: report[key] for key in ("machine", "versions", "date")}
    save("beside_other_programs", {**report, "kept": kept, "runs": speeds})


def _kept(states: dict[str, list[dict[str, Any]]], key: str) -> float:
    """Part of the quiet speed."""
    quiet, loud = (statistics.median(run[key] for run in states[s]) for s in ("quiet", "busy"))
    return quiet / loud if key.endswith("per_tile") else loud / quiet


if __name__ == "__main__":
    main()
