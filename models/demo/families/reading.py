"""Printed words and numbers anywhere in a picture."""

from __future__ import annotations

import random

from models.demo import language as words
from models.demo.drawing import (
    PALETTE,
    Canvas,
    Rgb,
    distance,
    jitter,
    random_background,
    visible_colours,
)
from models.demo.families.common import Question, Sketch, Style, ink_for, pick_zoom
from models.demo.families.lexicon import printed_word
from models.demo.fonts import pick_font
from models.demo.questions import ask

_SIZES = ((224, 140), (224, 140), (140, 224), (224, 224), (308, 140), (140, 308), (308, 224))
_TINTS = ("red", "green", "blue", "purple", "orange", "brown", "black", "white", "yellow", "pink")


class _Line:
    """A written line: its text, the name of its colour if it has one, and its centre."""

    def __init__(self, text: str, colour: str | None, x: float, y: float) -> None:
        self.text, self.colour, self.x, self.y = text, colour, x, y


def draw_words(rng: random.Random, style: Style) -> Sketch:
    """One to five words or numbers at random places; easy pictures have one large word."""
    easy = rng.random() > style.level
    width, height = rng.choice(_SIZES) if not easy else rng.choice(((140, 140), (140, 90)))
    width -= rng.randint(0, 16)
    height -= rng.randint(0, 16)
    background = random_background(rng)
    canvas = Canvas(width, height, pick_zoom(rng, style), background)
    _decorate(rng, canvas, background)
    n_lines = 1 if easy else rng.choice((1, 2, 3, 3, 4, 4, 5))
    tints = [name for name in visible_colours(background, 150.0) if name in _TINTS]
    rng.shuffle(tints)
    coloured = rng.random() < 0.6
    taken: list[tuple[float, float, float, float]] = []
    lines: list[_Line] = []
    for _ in range(n_lines * 6):
        if len(lines) == n_lines:
            break
        colour = tints[len(lines)] if coloured and len(lines) < len(tints) else None
        line = _write(rng, canvas, taken, colour, background, style, easy)
        if line is not None:
            lines.append(line)
    return Sketch(canvas, lambda asking: _ask(asking, lines))


def _decorate(rng: random.Random, canvas: Canvas, background: Rgb) -> None:
    """A frame or a few pale stripes, so that not every mark is a letter."""
    tone = jitter(rng, background, 26)
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            y = rng.uniform(0, canvas.height)
            canvas.line([(0, y), (canvas.width, y + rng.uniform(-30, 30))], tone, rng.uniform(2, 9))
    if rng.random() < 0.2:
        canvas.rectangle((4, 4, canvas.width - 4, canvas.height - 4), jitter(rng, background, 8))


def _write(
    rng: random.Random,
    canvas: Canvas,
    taken: list[tuple[float, float, float, float]],
    colour: str | None,
    background: Rgb,
    style: Style,
    easy: bool,
) -> _Line | None:
    text = printed_word(rng)
    font = pick_font(rng, style.held_back_fonts)
    size = rng.uniform(20, 30) if easy else rng.uniform(17, 30)
    width = canvas.text_width(text, font, size)
    if width > canvas.width - 12:
        size *= (canvas.width - 12) / width
        width = canvas.width - 12
    if size < 15:
        return None
    x = rng.uniform(6 + width / 2, canvas.width - 6 - width / 2)
    y = rng.uniform(size * 0.7, canvas.height - size * 0.7)
    box = (x - width / 2 - 4, y - size * 0.65, x + width / 2 + 4, y + size * 0.65)
    for other in taken:
        apart = box[0] > other[2] or box[2] < other[0] or box[1] > other[3] or box[3] < other[1]
        if not apart:
            return None
    taken.append(box)
    ink = jitter(rng, PALETTE[colour], 10) if colour else ink_for(rng, background)
    if colour is None and rng.random() < 0.2:  # a plate behind the word
        plate = jitter(rng, background, 30)
        if distance(plate, ink) > 200:
            canvas.rectangle(box, plate, 3)
    canvas.text((x, y), text, font, size, ink, "m")
    return _Line(text, colour, x, y)


def _ask(rng: random.Random, lines: list[_Line]) -> list[Question]:
    asked: list[Question] = []
    if len(lines) == 1:
        for _ in range(2):
            lang = rng.choice(words.LANGUAGES)
            asked.append(Question("reading", lang, ask(rng, "read", lang), lines[0].text))
        return asked
    for side in ("left", "right", "above", "below"):
        across = side in ("left", "right")
        ordered = sorted(lines, key=lambda line: line.x if across else line.y)
        if side in ("right", "below"):
            ordered.reverse()
        first, second = ordered[:2]
        gap = abs(first.x - second.x) if across else abs(first.y - second.y)
        if gap > (40 if across else 16):
            lang = rng.choice(words.LANGUAGES)
            text = ask(rng, "read_place", lang, place=words.PLACES[side][lang])
            asked.append(Question("reading", lang, text, first.text))
    for line in lines:
        if line.colour is not None:
            lang = rng.choice(words.LANGUAGES)
            colour = words.colour_name(lang, line.colour)
            text = ask(rng, "read_colour", lang, colour=colour)
            asked.append(Question("reading", lang, text, line.text))
    return asked
