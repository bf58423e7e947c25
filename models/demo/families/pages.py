"""Pages full of print: nothing is asked about them, but every character teaches vision."""

from __future__ import annotations

import random

from models.demo.drawing import Canvas, random_background
from models.demo.families.common import Sketch, Style, ink_for
from models.demo.families.lexicon import printed_word
from models.demo.families.receipts import printed_date
from models.demo.fonts import pick_font


def draw_page(rng: random.Random, style: Style) -> Sketch:
    """Lines of words and numbers from edge to edge, each line in a font and size of its own."""
    background = random_background(rng)
    canvas = Canvas(224, 224, 1.0, background)
    y = rng.uniform(0, 4)
    while y < canvas.height - 10:
        font = pick_font(rng, style.held_back_fonts)
        size = rng.uniform(14, 20) if rng.random() < 0.6 else rng.uniform(18, 30)
        ink = ink_for(rng, background)
        y += size * 0.6
        x = rng.uniform(-6, 10)
        while x < canvas.width:
            text = printed_date(rng) if rng.random() < 0.05 else printed_word(rng)
            right = canvas.text((x, y), text, font, size, ink)[2]
            x = right + size * rng.uniform(0.3, 1.0)
        y += size * rng.uniform(0.55, 0.8)
    return Sketch(canvas, lambda _: [])
