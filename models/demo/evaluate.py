"""Accuracy on pictures never trained on: `python -m models.demo.evaluate [BUNDLE ...]`.

Pictures come from the evaluation seeds and are drawn with fonts held back from training. Bundles,
and the checkpoint in PyTorch when it is asked for or there is no bundle, answer the same questions,
side by side. Bundles alone need no PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from models.demo.data import EVALUATION_SEEDS, MIXTURE, Picture, make_picture
from models.demo.families.common import Question
from models.demo.language import LANGUAGES
from models.demo.questions import FAMILIES

Z_95 = 1.959964
CHECKPOINT = Path(__file__).parent / "checkpoint"


class Answerer(Protocol):
    """Something that answers questions about a picture."""

    def answer(self, picture: Picture, questions: Sequence[Question]) -> list[str]: ...


class BundleAnswerer:
    """A bundle through the runtime, as a user would ask it: from an image file."""

    def __init__(self, path: str) -> None:
        from edge_vlm import EdgeVLM

        self._vlm = EdgeVLM.load(path)
        self._folder = Path(tempfile.mkdtemp(prefix="demo-evaluation-"))

    def answer(self, picture: Picture, questions: Sequence[Question]) -> list[str]:
        file = self._folder / "picture.png"
        Image.fromarray(picture.pixels).save(file)
        return [str(self._vlm.ask([str(file)], question.text).answer) for question in questions]


def normal(text: str) -> str:
    """Text without differences that nobody sees: composed characters, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def wilson(right: int, number: int) -> tuple[float, float]:
    """95 % interval of a share."""
    if number == 0:
        return 0.0, 1.0
    share = right / number
    square = Z_95 * Z_95
    centre = (share + square / (2 * number)) / (1 + square / number)
    spread = math.sqrt(share * (1 - share) / number + square / (4 * number * number))
    spread *= Z_95 / (1 + square / number)
    return max(0.0, centre - spread), min(1.0, centre + spread)


@dataclass
class Score:
    """Right answers out of a number of questions."""

    right: int = 0
    number: int = 0

    def add(self, is_right: bool) -> None:
        self.right += is_right
        self.number += 1

    @property
    def share(self) -> float:
        return self.right / max(1, self.number)

    def text(self) -> str:
        low, high = wilson(self.right, self.number)
        return f"{self.share:6.1%} ({low:.1%} to {high:.1%})"


@dataclass
class Result:
    """What one answerer scored."""

    families: dict[str, Score] = field(default_factory=lambda: {f: Score() for f in FAMILIES})
    languages: dict[str, Score] = field(default_factory=lambda: {k: Score() for k in LANGUAGES})
    both: dict[str, Score] = field(default_factory=dict)
    same_as_first: Score = field(default_factory=Score)
    mistakes: list[dict[str, str]] = field(default_factory=list)

    @property
    def overall(self) -> Score:
        """All questions together."""
        scores = self.families.values()
        return Score(sum(s.right for s in scores), sum(s.number for s in scores))

    def add(self, question: Question, answer: str, first: str, kind: str) -> None:
        is_right = normal(answer) == normal(question.answer)
        self.families[question.family].add(is_right)
        self.languages[question.language].add(is_right)
        self.both.setdefault(f"{question.family}/{question.language}", Score()).add(is_right)
        self.same_as_first.add(normal(answer) == normal(first))
        if not is_right:
            self.mistakes.append({**question._asdict(), "said": answer, "kind": kind})


def held_out(
    per_family: int, first_seed: int = EVALUATION_SEEDS
) -> Iterator[tuple[Picture, list[Question]]]:
    """Pictures with questions until each family has `per_family` of them."""
    left = dict.fromkeys(FAMILIES, per_family)
    seed = first_seed
    while any(left.values()):
        picture = make_picture(seed, MIXTURE)
        seed += 1
        chosen = []
        taken: dict[str, int] = {}
        for question in picture.questions:
            # At most three of a family from one picture, so that the questions are not all alike.
            if left[question.family] and taken.get(question.family, 0) < 3:
                taken[question.family] = taken.get(question.family, 0) + 1
                left[question.family] -= 1
                chosen.append(question)
        if chosen:
            yield picture, chosen


def evaluate(
    answerers: dict[str, Answerer],
    pictures: Iterable[tuple[Picture, list[Question]]],
    report_every: int = 200,
) -> dict[str, Result]:
    """Ask every answerer every question."""
    results = {name: Result() for name in answerers}
    started = time.monotonic()
    for number, (picture, questions) in enumerate(pictures, 1):
        first: list[str] | None = None
        for name, answerer in answerers.items():
            answers = answerer.answer(picture, questions)
            first = first or answers
            for question, answer, reference in zip(questions, answers, first, strict=True):
                results[name].add(question, answer, reference, picture.kind)
        if number % report_every == 0:
            print(f"{number} pictures, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return results


def print_table(results: dict[str, Result]) -> None:
    """Accuracy of each family and language, one column an answerer."""
    print(f"{'':12}{'questions':>10}" + "".join(f"  {name:>26}" for name in results))
    first = next(iter(results.values()))
    for title in ("families", "languages"):
        for key, score in getattr(first, title).items():
            cells = [f"  {getattr(result, title)[key].text():>26}" for result in results.values()]
            print(f"{key:12}{score.number:>10}" + "".join(cells))
        print()
    cells = [f"  {result.overall.text():>26}" for result in results.values()]
    print(f"{'all':12}{first.overall.number:>10}" + "".join(cells))
    for name, result in list(results.items())[1:]:
        print(f"{name} answers as {next(iter(results))}: {result.same_as_first.text()}")


def as_json(results: dict[str, Result]) -> str:
    """The tables, machine-readable, with up to 200 mistakes of each answerer."""
    content = {}
    for name, result in results.items():
        tables = {
            title: {
                key: {
                    "questions": score.number,
                    "accuracy": round(score.share, 4),
                    "interval_95": [round(edge, 4) for edge in wilson(score.right, score.number)],
                }
                for key, score in getattr(result, title).items()
            }
            for title in ("families", "languages", "both")
        }
        content[name] = {
            **tables,
            "accuracy": round(result.overall.share, 4),
            "same_as_first": round(result.same_as_first.share, 4),
            "mistakes": result.mistakes[:200],
        }
    return json.dumps(content, indent=1, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on pictures never trained on.")
    parser.add_argument("bundles", nargs="*", help="bundles to evaluate")
    parser.add_argument(
        "--checkpoint", type=Path, nargs="?", const=CHECKPOINT, help="also this one, in PyTorch"
    )
    parser.add_argument("--per-family", type=int, default=1000, help="questions of each family")
    parser.add_argument("--blank", nargs="*", default=[], choices=("tiles", "thumbnail"))
    parser.add_argument("--device", default="cpu", help="of PyTorch")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: as it chooses")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    answerers: dict[str, Answerer] = {}
    if options.checkpoint or options.blank or not options.bundles:
        from models.demo.torch_answerer import TorchAnswerer, set_threads

        set_threads(options.threads)
        checkpoint = options.checkpoint or CHECKPOINT
        answerers["pytorch"] = TorchAnswerer(checkpoint, "", options.device)
        for part in options.blank:
            answerers[f"no {part}"] = TorchAnswerer(checkpoint, part, options.device)
    for path in options.bundles:
        answerers[Path(path).name] = BundleAnswerer(path)
    results = evaluate(answerers, held_out(options.per_family))
    print_table(results)
    if options.json:
        options.json.write_text(as_json(results) + "\n", "utf-8")


if __name__ == "__main__":
    main()
