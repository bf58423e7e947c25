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


@dataclass(frozen=True)
class Picture:
    """A finished picture: (height, width, 3) uint8, its drawing record, and its questions."""

    kind: str
    pixels: npt.NDArray[np.uint8]
    canvas: Canvas
    questions: list[Question]


def make_picture(
    seed: int, mixture: Mapping[str, float] = MIXTURE, level: float = 1.0, gentle: bool = False
) -> Picture:
    """The picture of a seed, always the same; `gentle` leaves out blur and strong noise."""
    rng = random.Random(seed)
    style = Style(held_back_fonts=seed >= EVALUATION_SEEDS, level=level)
    while True:
        kind = rng.choices(list(mixture), list(mixture.values()))[0]
        sketch = KINDS[kind](rng, style)
        if sketch.questions:
            break
    questions = list(sketch.questions)
    rng.shuffle(questions)
    return Picture(kind, finish(rng, sketch.canvas, gentle), sketch.canvas, questions)
