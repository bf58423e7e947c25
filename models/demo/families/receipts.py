"""Receipts and small price tables."""

from __future__ import annotations

import random

from models.demo import language as words
from models.demo.drawing import Canvas, Rgb, jitter, shade
from models.demo.families.common import Question, Sketch, Style, ink_for, pick_zoom
from models.demo.families.lexicon import ITEMS, SHOPS
from models.demo.fonts import pick_font
from models.demo.questions import ask

_TOTALS = ("TOTAL", "Total", "Total", "SUM", "Summe", "SUMME")


def printed_date(rng: random.Random) -> str:
    """A date, day before month where the order could be in doubt."""
    year, month, day = rng.randint(2015, 2029), rng.randint(1, 12), rng.randint(1, 28)
    return rng.choice(
        (f"{year}-{month:02d}-{day:02d}", f"{day:02d}.{month:02d}.{year}",
         f"{day:02d}/{month:02d}/{year}")
    )  # fmt: skip


def _paper(rng: random.Random) -> tuple[int, float]:
    """Width of the paper and font size: narrow with small print, or wide with large print."""
    if rng.random() < 0.6:
        return rng.randint(132, 140), rng.uniform(14.0, 15.5)
    return rng.randint(190, 222), rng.uniform(16.0, 19.0)


def _cents(value: int) -> str:
    return f"{value // 100}.{value % 100:02d}"


def draw_receipt(rng: random.Random, style: Style) -> Sketch:
    """A shop's name, the date, two to five items with prices, and the total."""
    n_items = rng.choice((2, 3, 3, 4, 4, 5) if style.level > 0.5 else (1, 2, 2, 3))
    items = rng.sample(ITEMS, n_items)
    prices = [rng.choice((rng.randint(50, 999), rng.randint(100, 2999))) for _ in items]
    date = printed_date(rng)
    font = pick_font(rng, style.held_back_fonts)
    width, size = _paper(rng)
    spacing = size * rng.uniform(1.35, 1.55)
    has_name = rng.random() < 0.8
    n_lines = n_items + 2 + has_name
    height = round(n_lines * spacing + 22)
    paper = jitter(rng, rng.choice(((250, 250, 248), (246, 240, 226), (236, 238, 240))), 5)
    canvas = Canvas(width, height, pick_zoom(rng, style), paper)
    ink = ink_for(rng, paper)
    size = _fitting(canvas, items, font, size)
    y = 8 + spacing / 2
    if has_name:
        canvas.text((width / 2, y), rng.choice(SHOPS), font, size * 1.1, ink, "m")
        y += spacing
    date_at_end = rng.random() < 0.3
    if not date_at_end:
        canvas.text((width / 2, y), date, font, size, ink, "m")
        y += spacing
    rule = shade(paper, 0.6)
    canvas.line([(8, y - spacing * 0.45), (width - 8, y - spacing * 0.45)], rule, 1)
    y += 3
    for item, price in zip(items, prices, strict=True):
        _row(canvas, y, item, _cents(price), font, size, ink)
        y += spacing
    total = _cents(sum(prices))
    canvas.line([(8, y - spacing * 0.45), (width - 8, y - spacing * 0.45)], rule, 1)
    y += 3
    _row(canvas, y, rng.choice(_TOTALS), total, font, size, ink)
    y += spacing
    if date_at_end:
        canvas.text((width / 2, y), date, font, size, ink, "m")
    facts = [("total", total), ("date", date)]
    return Sketch(canvas, lambda asking: _ask(asking, items, prices, facts))


def draw_table(rng: random.Random, style: Style) -> Sketch:
    """A ruled table of items and prices, with or without a date above it and a total below."""
    n_items = rng.choice((2, 3, 4, 4, 5) if style.level > 0.5 else (1, 2, 3))
    items = rng.sample(ITEMS, n_items)
    prices = [rng.choice((rng.randint(50, 999), rng.randint(100, 2999))) for _ in items]
    font = pick_font(rng, style.held_back_fonts)
    width, size = _paper(rng)
    spacing = size * rng.uniform(1.4, 1.6)
    date = printed_date(rng) if rng.random() < 0.5 else None
    has_total = rng.random() < 0.6
    n_lines = n_items + (date is not None) + has_total
    height = round(n_lines * spacing + 16)
    paper = jitter(rng, (248, 248, 246), 7)
    canvas = Canvas(width, max(height, 70), pick_zoom(rng, style), paper)
    ink = ink_for(rng, paper)
    rule = shade(paper, rng.uniform(0.45, 0.8))
    size = _fitting(canvas, items, font, size)
    y = 8 + spacing / 2
    if date is not None:
        canvas.text((10, y), date, font, size, ink, "l")
        y += spacing
    top = y - spacing / 2
    if rng.random() < 0.5:
        stripe = jitter(rng, shade(paper, 0.93), 6)
        for row in range(0, n_items, 2):
            band = y + row * spacing
            canvas.rectangle((4, band - spacing / 2, width - 4, band + spacing / 2), stripe)
    for item, price in zip(items, prices, strict=True):
        canvas.line([(4, y - spacing / 2), (width - 4, y - spacing / 2)], rule, 1)
        _row(canvas, y, item, _cents(price), font, size, ink)
        y += spacing
    canvas.line([(4, y - spacing / 2), (width - 4, y - spacing / 2)], rule, 1)
    if rng.random() < 0.5:
        split = width * 0.6
        canvas.line([(split, top), (split, y - spacing / 2)], rule, 1)
    facts: list[tuple[str, str]] = []
    if has_total:
        total = _cents(sum(prices))
        _row(canvas, y, rng.choice(_TOTALS), total, font, size, ink)
        facts.append(("total", total))
    if date is not None:
        facts.append(("date", date))
    return Sketch(canvas, lambda asking: _ask(asking, items, prices, facts))


def _fitting(canvas: Canvas, items: list[str], font: str, size: float) -> float:
    """The font size, smaller where a name would run into its price."""
    widest = max(canvas.text_width(f"{item}  188.88", font, size) for item in [*items, "Summe"])
    return size * min(1.0, (canvas.width - 20) / widest)


def _row(
    canvas: Canvas, y: float, name: str, amount: str, font: str, size: float, ink: Rgb
) -> None:
    canvas.text((10, y), name, font, size, ink, "l")
    canvas.text((canvas.width - 10, y), amount, font, size, ink, "r")


def _ask(
    rng: random.Random, items: list[str], prices: list[int], facts: list[tuple[str, str]]
) -> list[Question]:
    """The price of each item, and the facts: (kind of question, answer)."""
    asked = []
    for kind, answer in facts:
        lang = rng.choice(words.LANGUAGES)
        asked.append(Question("receipt", lang, ask(rng, kind, lang), answer))
    for item, price in zip(items, prices, strict=True):
        lang = rng.choice(words.LANGUAGES)
        text = ask(rng, "price", lang, label=item)
        asked.append(Question("receipt", lang, text, _cents(price)))
    return asked
