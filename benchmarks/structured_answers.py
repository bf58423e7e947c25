"""Ask the demo model for answers of a form and count those that fit: all of them should.

    python benchmarks/structured_answers.py [QUESTIONS]

Pictures and questions are the example ones in turn; limits, temperatures and seeds are random.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jsonschema

from edge_vlm import Answer, EdgeVLM, MachineSettings

EXAMPLES = Path(__file__).parent.parent / "examples"
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "minLength": 1},
        "count": {"type": "integer", "minimum": -3, "maximum": 120},
        "day": {"type": ["string", "null"], "format": "date"},
        "parts": {
            "type": "array",
            "maxItems": 5,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "price": {"type": "number"}},
                "required": ["name"],
            },
        },
    },
    "required": ["answer", "count", "parts"],
}
PATTERNS = [r"\d+\.\d\d", r"(?i)(yes|no)[.!]?", r"[^\W\d]{2,70}", r" *(\w+ ){2}[é漢].*", r"[01]+"]


def main() -> None:
    """Print one line for each form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n", nargs="?", type=int, default=300, help="answers of each form")
    n = parser.parse_args().n
    table = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
    chosen = random.Random(0)
    settings = MachineSettings(threads=1)
    with EdgeVLM.load("demo", settings=settings) as vlm:

        def schema(question: tuple[str, str], limit: int, heat: float, seed: int) -> Answer:
            answer = ask(question, limit, heat, seed, schema=SCHEMA)
            jsonschema.validate(json.loads(answer.answer), SCHEMA)
            return answer

        def choices(question: tuple[str, str], limit: int, heat: float, seed: int) -> Answer:
            wanted = ["yes", "no", "unsure", "yes, both", f"{seed}"]
            answer = ask(question, limit, heat, seed, choices=wanted)
            assert answer.choices is not None
            assert abs(sum(answer.choices.values()) - 1) < 1e-9
            assert answer.choices[answer.answer] == max(answer.choices.values())
            return answer

        def regex(question: tuple[str, str], limit: int, heat: float, seed: int) -> Answer:
            pattern = PATTERNS[seed % len(PATTERNS)]
            answer = ask(question, limit, heat, seed, regex=pattern)
            assert re.fullmatch(pattern, answer.answer), (pattern, answer.answer)
            return answer

        def ask(
            question: tuple[str, str], limit: int, heat: float, seed: int, **form: object
        ) -> Answer:
            picture = EXAMPLES / question[0]
            how = {"max_tokens": limit, "temperature": heat, "seed": seed}
            return vlm.ask(picture, question[1], **how, **form)

        forms: list[Callable[..., Answer]] = [schema, choices, regex]
        for form in forms:
            started = time.perf_counter()
            n_valid = n_cut = 0
            for entry in itertools.islice(itertools.cycle(table), n):
                limit = chosen.choice([40, 48, 64, 128, 256])
                heat = chosen.choice([0.0, 0.7, 1.5, 3.0])
                try:
                    question = (entry["image"], entry["question"])
                    answer = form(question, limit, heat, chosen.randrange(1000))
                except (AssertionError, ValueError, jsonschema.ValidationError) as error:
                    print(f"{form.__name__}: {error}", file=sys.stderr)
                    continue
                n_valid += 1
                n_cut += answer.finish_reason == "length"
            seconds = time.perf_counter() - started
            print(
                f"{form.__name__:<8} {n_valid} of {n} valid, {n_cut} of them ended by the limit,"
                f" {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
