"""What every kind of picture shares."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from models.demo.drawing import Canvas, Rgb, distance, jitter


class Question(NamedTuple):
    """A question about a picture; `family` is one of `questions.FAMILIES`."""

    family: str
    language: str
    text: str
    answer: str


@dataclass
class Sketch:
    """A drawn canvas and what can be asked about it."""

    canvas: Canvas
    questions: list[Question] = field(default_factory=list)


@dataclass(frozen=True)
class Style:
    """What the caller decides about a picture; `level` 0 is easiest, 1 is the full difficulty."""

    held_back_fonts: bool = False
    level: float = 1.0


def pick_zoom(rng: random.Random, style: Style) -> float:
    """Native pixels per design pixel: many photos are larger than what the model sees of them."""
    return rng.choice((1.0, 1.0, 1.0, 1.25, 1.5, rng.uniform(0.9, 1.8)))


def ink_for(rng: random.Random, background: Rgb) -> Rgb:
    """A text colour that is easy to tell from the background."""
    for _ in range(20):
        if sum(background) > 384:
            ink = jitter(rng, (40, 40, 44), 40)
        else:
            ink = jitter(rng, (225, 225, 225), 30)
        if distance(ink, background) > 220:
            return ink
    return (0, 0, 0) if sum(background) > 384 else (255, 255, 255)
