"""Choose example pictures that the demo model answers: `python -m models.demo.examples`.

Pictures come from seeds that neither training nor evaluation uses, in fonts held back from
training. Of each kind those pictures whose questions are answered best are kept, with one question
in each language among those answered right.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from models.demo.checkpoint import CHECKPOINT
from models.demo.data import EVALUATION_SEEDS, Picture, make_picture
from models.demo.evaluate import normal
from models.demo.families.common import Question
from models.demo.language import LANGUAGES
from models.demo.torch_answerer import TorchAnswerer

EXAMPLE_SEEDS = EVALUATION_SEEDS + (1 << 30)
KINDS = {"receipt": "receipt", "table": "table", "chart": "chart", "scene": "scene",
         "shelf": "shelf", "sign": "words", "shapes": "shapes"}  # fmt: skip
COUNTS = {"receipt": 1, "table": 1, "chart": 2, "scene": 2, "shelf": 2, "sign": 1, "shapes": 1}


def _one_per_language(right: list[Question]) -> list[Question]:
    """A right question in each language, as many kinds of answers as there are."""
    chosen: list[Question] = []
    used: set[tuple[str, str]] = set()
    for language in LANGUAGES:
        mine = [question for question in right if question.language == language]
        mine.sort(key=lambda question: (question.family, question.answer) in used)
        if mine:
            chosen.append(mine[0])
            used.add((mine[0].family, mine[0].answer))
    return chosen


def choose(
    answerer: TorchAnswerer, kind: str, n_pictures: int, n_tried: int
) -> list[tuple[Picture, list[Question]]]:
    """The pictures of a kind whose questions are answered best."""
    ranked: list[tuple[float, int, Picture, list[Question]]] = []
    for number in range(n_tried):
        picture = make_picture(EXAMPLE_SEEDS + number, {kind: 1.0}, n_rounds=6)
        answers = answerer.answer(picture, picture.questions)
        right = [
            question
            for question, answer in zip(picture.questions, answers, strict=True)
            if normal(answer) == normal(question.answer)
        ]
        chosen = _one_per_language(right)
        distinct = len({question.answer for question in chosen})
        share = len(right) / len(picture.questions)
        # Every language first, then few mistakes, then a picture that has much to say.
        ranked.append((len(chosen) + share + 0.05 * distinct, -number, picture, chosen))
    ranked.sort(key=lambda entry: entry[:2], reverse=True)
    return [(picture, chosen) for _, _, picture, chosen in ranked[:n_pictures]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose example pictures.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--output", type=Path, default=Path("examples"))
    parser.add_argument("--tried", type=int, default=40, help="pictures of each kind to try")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch chooses")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    answerer = TorchAnswerer(options.checkpoint)
    images = options.output / "images"
    images.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for name, kind in KINDS.items():
        for number, (picture, questions) in enumerate(
            choose(answerer, kind, COUNTS[name], options.tried), 1
        ):
            file = f"{name}-{number}.png"
            Image.fromarray(picture.pixels).save(images / file, optimize=True)
            for question in questions:
                entries.append(
                    {
                        "image": f"images/{file}",
                        "question": question.text,
                        "answer": question.answer,
                        "language": question.language,
                    }
                )
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    (options.output / "questions.json").write_text(text + "\n", "utf-8")
    (options.output / "README.md").write_text(_table(entries), "utf-8")


def _table(entries: list[dict[str, Any]]) -> str:
    lines = [
        "# Example pictures",
        "",
        "Drawn by the generator of the [demo model](../models/demo/README.md), from seeds that its"
        " training",
        "never saw. It answers each of these questions as written here:",
        "",
        '    edge-vlm ask examples/images/receipt-1.png "What is the total?"',
        "",
        "`questions.json` holds the same table for programs.",
        "",
        "| picture | question | answer |",
        "| --- | --- | --- |",
    ]
    shown = ""
    for entry in entries:
        link = f"[{Path(entry['image']).name}]({entry['image']})"
        lines.append(
            f"| {link if entry['image'] != shown else ''} | {entry['question']} |"
            f" {entry['answer']} |"
        )
        shown = entry["image"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
