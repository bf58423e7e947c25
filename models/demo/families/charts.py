"""Bar charts with the value printed at each bar."""

from __future__ import annotations

import random
from itertools import pairwise

from models.demo import language as words
from models.demo.drawing import PALETTE, Canvas, jitter, shade
from models.demo.families.common import Question, Sketch, Style, ink_for, pick_zoom
from models.demo.families.lexicon import LABELS, SHOPS
from models.demo.fonts import pick_font
from models.demo.questions import ask


def draw_chart(rng: random.Random, style: Style) -> Sketch:
    """Three to six upright bars, a label under each and its value above it."""
    n_bars = rng.choice((3, 3, 4, 4, 5) if style.level > 0.5 else (2, 3, 3))
    width = n_bars * rng.randint(40, 48) + 20 if n_bars > 3 else 140
    height = rng.choice((126, 140, 140, 210))
    background = jitter(rng, rng.choice(((250, 250, 250), (244, 240, 232), (234, 240, 246))), 5)
    canvas = Canvas(width, height, pick_zoom(rng, style), background)
    font = pick_font(rng, style.held_back_fonts)
    ink = ink_for(rng, background)
    labels = rng.sample(LABELS, n_bars)
    values = _values(rng, n_bars)
    floor = float(height - 26)
    ceiling = 24.0
    if rng.random() < 0.35:
        canvas.text((width / 2, 13), rng.choice(SHOPS).capitalize(), font, 17, ink, "m")
        ceiling = 46.0
    if rng.random() < 0.4:
        for step in range(1, 5):
            y = floor - (floor - ceiling) * step / 4
            canvas.line([(10, y), (width - 8, y)], shade(background, 0.9), 1)
    canvas.line([(8, floor), (width - 8, floor)], ink, 1.5)
    if rng.random() < 0.5:
        canvas.line([(8, ceiling - 8), (8, floor)], ink, 1.5)
    colours = [name for name in PALETTE if name not in ("white", "black")]
    one_colour = rng.choice(colours) if rng.random() < 0.4 else None
    rng.shuffle(colours)
    step_x = (width - 20) / n_bars
    thickness = step_x * rng.uniform(0.45, 0.75)
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        x = 12 + step_x * (index + 0.5)
        top = floor - (floor - ceiling) * value / max(values)
        fill = jitter(rng, PALETTE[one_colour or colours[index]], 12)
        canvas.rectangle((x - thickness / 2, top, x + thickness / 2, floor), fill)
        canvas.text((x, top - 10), str(value), font, 16, ink, "m")
        size = min(17.0, 17.0 * (step_x - 3) / canvas.text_width(label, font, 17.0))
        canvas.text((x, floor + 13), label, font, size, ink, "m")
    return Sketch(canvas, lambda asking: _ask(asking, labels, values))


def _values(rng: random.Random, n_bars: int) -> list[int]:
    """Distinct values whose largest stands out by a tenth."""
    most = rng.choice((10, 20, 50, 99, 99, 400))
    while True:
        values = [rng.randint(max(1, most // 8), most) for _ in range(n_bars)]
        ordered = sorted(values)
        apart = all(b - a > 0.06 * ordered[-1] for a, b in pairwise(ordered))
        if (apart or rng.random() < 0.02) and len(set(values)) == n_bars:
            return values


def _ask(rng: random.Random, labels: list[str], values: list[int]) -> list[Question]:
    asked: list[Question] = []
    highest = values.index(max(values))
    lowest = values.index(min(values))
    for kind, answer in (
        ("tallest", labels[highest]),
        ("tallest_value", str(values[highest])),
        ("shortest", labels[lowest]),
    ):
        lang = rng.choice(words.LANGUAGES)
        asked.append(Question("chart", lang, ask(rng, kind, lang), answer))
    for label, value in zip(labels, values, strict=True):
        lang = rng.choice(words.LANGUAGES)
        text = ask(rng, "bar_value", lang, label=label)
        asked.append(Question("chart", lang, text, str(value)))
    return asked
