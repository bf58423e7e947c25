"""Pictures with questions, from a seed: the demo model's only source of data."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.demo.drawing import Canvas, finish
from models.demo.families.charts import draw_chart
from models.demo.families.common import Question, Sketch, Style
from models.demo.families.objects import draw_scene, draw_shapes, draw_shelf
from models.demo.families.pages import draw_page
from models.demo.families.reading import draw_words
from models.demo.families.receipts import draw_receipt, draw_table

# Seeds at or above this are for evaluation alone; they also choose the fonts that are held back.
EVALUATION_SEEDS = 1 << 40

KINDS: dict[str, Callable[[random.Random, Style], Sketch]] = {
    "shapes": draw_shapes,
    "scene": draw_scene,
    "shelf": draw_shelf,
    "words": draw_words,
    "chart": draw_chart,
    "receipt": draw_receipt,
    "table": draw_table,
    "page": draw_page,
}
MIXTURE: Mapping[str, float] = {
    "shapes": 2.0,
    "scene": 1.0,
    "shelf": 1.2,
    "words": 3.0,
    "chart": 1.6,
    "receipt": 1.4,
    "table": 0.8,
}
# Pages teach reading many times faster than words that are asked about, one by one.
TRAINING_MIXTURE: Mapping[str, float] = {**MIXTURE, "page": 3.0}


@dataclass(frozen=True)
class Picture:
    """A finished picture: (height, width, 3) uint8, its drawing record, and its questions."""

    kind: str
    pixels: npt.NDArray[np.uint8]
    canvas: Canvas
    questions: list[Question]


def make_picture(
    seed: int,
    mixture: Mapping[str, float] = MIXTURE,
    level: float = 1.0,
    gentle: bool = False,
    n_rounds: int = 2,
) -> Picture:
    """The picture of a seed, always the same.

    Args:
        seed: at or above EVALUATION_SEEDS for evaluation.
        mixture: how often each kind is drawn.
        level: difficulty, 0 to 1.
        gentle: leave out blur and strong noise.
        n_rounds: how often each kind of question is asked, in languages drawn at random.
    """
    rng = random.Random(seed)
    style = Style(held_back_fonts=seed >= EVALUATION_SEEDS, level=level)
    asking = random.Random(f"questions about {seed}")
    questions: list[Question] = []
    kind = ""
    while not questions and kind != "page":
        kind = rng.choices(list(mixture), list(mixture.values()))[0]
        sketch = KINDS[kind](rng, style)
        rounds = [question for _ in range(n_rounds) for question in sketch.ask(asking)]
        questions = list(dict.fromkeys(rounds))
    asking.shuffle(questions)
    return Picture(kind, finish(rng, sketch.canvas, gentle), sketch.canvas, questions)
