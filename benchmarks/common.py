"""What the benchmark scripts share: the command they measure, and where results go."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def bench_arguments(description: str) -> list[str]:
    """Those of a script that hands all of them to ``edge-vlm bench``; ``--help`` is its own."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options of edge-vlm bench]",
        allow_abbrev=False,
    )
    return parser.parse_known_args()[1]


def bench(command: str, *arguments: str) -> dict[str, Any]:
    """``edge-vlm bench --json`` with further arguments."""
    done = subprocess.run(
        [command, "bench", "--json", *arguments], stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def child(request: dict[str, Any], *arguments: str) -> dict[str, float]:
    """What the running script prints, as its last line, when called with ``--child REQUEST``."""
    command = [sys.executable, sys.argv[0], *arguments, "--child", json.dumps(request)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each number of each program's runs."""
    return {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }


def save(name: str, data: dict[str, Any]) -> None:
    """Write ``results/NAME.json``, with the command that measured it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    path.write_text(json.dumps({**data, "command": " ".join(command)}, indent=1) + "\n", "utf-8")
    print(path, file=sys.stderr)
