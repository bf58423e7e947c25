"""What every kind of picture shares."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from models.demo.drawing import Canvas, Rgb, distance, jitter


class Question(NamedTuple):
    """A question about a picture; `family` is one of `questions.FAMILIES`."""

    family: str
    language: str
    text: str
    answer: str


@dataclass(frozen=True)
class Sketch:
    """A drawn canvas, and a way to ask about it: other questions each time it is called."""

    canvas: Canvas
    ask: Callable[[random.Random], list[Question]]


@dataclass(frozen=True)
class Style:
    """What the caller decides about a picture; `level` 0 is easiest, 1 is the full difficulty."""

    held_back_fonts: bool = False
    level: float = 1.0


def pick_zoom(rng: random.Random, style: Style) -> float:
    """Native pixels per design pixel; larger pictures cost more crops, so most are small."""
    return 1.0 if rng.random() < 0.75 else rng.uniform(0.9, 1.9)


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
