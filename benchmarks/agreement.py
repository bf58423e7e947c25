"""Whether answers stay the same under every engine setting and KV type: tokens that agree.

    python benchmarks/agreement.py --questions 200

The demo model answers held-out questions greedily under each setting; counted are tokens that equal
those of the untuned settings up to the first that differs. The result is
benchmarks/results/agreement.json.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import save

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.measure.bench import circumstances

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.demo.evaluate import held_out
from models.demo.questions import FAMILIES

UNTUNED = "untuned"
VARIANTS: dict[str, dict[str, Any]] = {
    UNTUNED: {},
    "two threads": {"threads": 2},
    "batch size 32": {"batch_size": 32},
    "batch size 128": {"batch_size": 128},
    "two streams": {"vision_threads": 2, "vision_streams": 2},
    "no flash attention": {"flash_attention": "off"},
    "flash attention": {"flash_attention": "on"},
    "repacking": {"repack": True},
    "no memory mapping": {"mmap": False},
    "spinning": {"spinning": True},
    "four tiles a call": {"tiles_per_call": 4},
    "taking turns": {"residency": "in-turns"},
    "KV q8_0": {"kv_type": "q8_0"},
    "KV q4_0": {"kv_type": "q4_0"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    asked = [
        (picture.pixels, question.text)
        for picture, questions in held_out(-(-options.questions // len(FAMILIES)))
        for question in questions
    ][: options.questions]
    expected: list[tuple[int, ...]] = []
    rows = []
    for name, change in VARIANTS.items():
        settings = MachineSettings(**{"threads": 1, "residency": "together", **change})
        with EdgeVLM.load(options.model, settings=settings.without_cache()) as vlm:
            found = [vlm.ask(pixels, text, max_tokens=64).token_ids for pixels, text in asked]
        expected = expected or found
        same = sum(map(_agreeing, found, expected))
        total = sum(len(ids) for ids in expected)
        whole = sum(a == b for a, b in zip(found, expected, strict=True))
        rows.append({"name": name, "same_answers": whole, "same_tokens": same, "tokens": total})
        print(f"{name}: {same} of {total} tokens, {whole} of {len(asked)} answers", file=sys.stderr)
    save(
        "agreement",
        {
            **circumstances(),
            "questions": len(asked),
            "rows": rows,
        },
    )


def _agreeing(found: Sequence[int], expected: Sequence[int]) -> int:
    pairs = zip(found, expected, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


if __name__ == "__main__":
    main()
