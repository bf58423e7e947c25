"""Pictures that are drawn here, so that nothing has to be shipped or downloaded.

Receipts, tables, charts, shapes, signs, scenes and pages come with a conversation in several
languages whose answers are known. Others show print, shapes and textures of many kinds, for what a
vision tower's activations can be.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

UInt8 = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Drawn = tuple[UInt8, tuple[tuple[str, str], ...]]  # (height, width, 3), questions and answers

_SIDE = 378  # pixels: one tile and the thumbnail with jina-vlm's released sizes
_LARGE = 512
_INK = (25, 25, 30)
_WORDS = "receipt total date 2024 paper street open Montag señal 3.50 % north invoice été 17:45"


def drawn_conversations(number: int) -> Iterator[Drawn]:
    """One of each kind, the same for each number."""
    for kind in (_receipt, _chart, _shapes, _sign, _table, _scene, _page):
        yield kind(random.Random(f"{kind.__name__} {number}"))  # noqa: S311 - always the same


def drawn_pictures() -> Iterator[UInt8]:
    """Eight drawn pictures: print, shapes, textures, and all of it together; always the same."""
    rng = np.random.default_rng(0)
    for index in range(8):
        kind = index % 4
        picture = _texture(rng) if kind in (2, 3) else Image.new("RGB", (_LARGE, _LARGE), "white")
        if kind in (1, 3):
            _many_shapes(picture, rng)
        if kind in (0, 3):
            _print(picture, rng)
        yield np.asarray(picture)


def _print(picture: Image.Image, rng: np.random.Generator) -> None:
    """Lines of words in several sizes."""
    draw = ImageDraw.Draw(picture)
    words = _WORDS.split()
    y = int(rng.integers(4, 24))
    while y < _LARGE:
        size = int(rng.choice([11, 14, 18, 24, 36]))
        line = " ".join(rng.choice(words, 12))
        level = int(rng.integers(0, 110))
        font = ImageFont.load_default(size)
        draw.text((int(rng.integers(4, 60)), y), line, (level, level, level), font)
        y += int(size * 1.5)


def _many_shapes(picture: Image.Image, rng: np.random.Generator) -> None:
    """Filled and outlined shapes in strong colours, as in charts and signs."""
    draw = ImageDraw.Draw(picture)
    for _ in range(24):
        x, y = rng.integers(-40, _LARGE, 2).tolist()
        width, height = rng.integers(12, 220, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        box = (x, y, x + width, y + height)
        (draw.ellipse, draw.rectangle)[int(rng.integers(2))](box, colour, "black")
        draw.line((x, y + height, x + width, y), colour[::-1], int(rng.integers(1, 7)))


def _texture(rng: np.random.Generator) -> Image.Image:
    """Noise with the spectrum of photographs: amplitude falls with frequency."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(_LARGE), np.fft.fftfreq(_LARGE)))
    spectrum = 1 / np.maximum(frequency, 1 / _LARGE) ** 1.1
    channels = []
    for _ in range(3):
        noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((_LARGE, _LARGE))) * spectrum).real
        channels.append(128 + 52 * noise / noise.std())
    pixels = np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))


_GOODS = ("Bread", "Milk", "Coffee", "Apples", "Rice", "Soap", "Cheese", "Tea", "Paper", "Lamp")
_COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 150, 70),
    "blue": (40, 80, 190),
    "yellow": (230, 200, 50),
    "black": (20, 20, 20),
}


def _receipt(rng: random.Random) -> Drawn:
    image, draw = _canvas((244, 242, 236), 300, 376)
    prices = {item: rng.randint(90, 1990) / 100 for item in rng.sample(_GOODS, 5)}
    date = f"{rng.randint(1, 28):02}.{rng.randint(1, 12):02}.20{rng.randint(10, 29)}"
    _write(draw, 70, 20, "CORNER SHOP", 24)
    _write(draw, 100, 52, date, 16)
    for row, (item, price) in enumerate(prices.items()):
        _write(draw, 24, 90 + 36 * row, item, 20)
        _write(draw, 220, 90 + 36 * row, f"{price:.2f}", 20)
    total = f"{sum(prices.values()):.2f}"
    draw.line((20, 280, 280, 280), fill=(60, 60, 60), width=2)
    _write(draw, 24, 295, f"TOTAL      {total}", 26)
    first = next(iter(prices))
    return _sample(
        image,
        ("What is the total?", total),
        (f"Wie teuer ist {first}?", f"{prices[first]:.2f}"),
        ("¿Qué fecha lleva el recibo?", date),
        ("收据上有几件商品？", "五件"),
    )


def _chart(rng: random.Random) -> Drawn:
    image, draw = _canvas((255, 255, 255))
    values = dict(zip(rng.sample(_GOODS, 5), rng.sample(range(10, 100), 5), strict=True))
    for index, (name, value) in enumerate(values.items()):
        left = 30 + 68 * index
        colour = list(_COLOURS.values())[index]
        draw.rectangle((left, 330 - 2.7 * value, left + 44, 330), fill=colour)
        _write(draw, left, 310 - 2.7 * value, str(value), 16)
        _write(draw, left - 4, 338, name, 15)
    highest, lowest = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
    return _sample(
        image,
        ("Which bar is the highest?", highest),
        ("Quelle est la plus petite valeur ?", f"{lowest}, {values[lowest]}"),
        ("何本の棒がありますか。", "5本あります。"),
        (f"Сколько у {highest}?", str(values[highest])),
    )


def _shapes(rng: random.Random) -> Drawn:
    image, draw = _canvas((225, 228, 230))
    cells = rng.sample([(x, y) for x in range(4) for y in range(4)], rng.randint(3, 7))
    names = [rng.choice(list(_COLOURS)) for _ in cells]
    for (x, y), name in zip(cells, names, strict=True):
        box = (20 + 88 * x, 20 + 88 * y, 84 + 88 * x, 84 + 88 * y)
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=_COLOURS[name])
    return _sample(
        image,
        ("How many things are there?", str(len(cells))),
        (f"Gibt es etwas in der Farbe {names[0]}?", "Ja"),
        ("¿De qué color es el fondo?", "Gris claro."),
        ("도형이 모두 몇 개입니까?", f"{len(cells)}개"),
    )


def _sign(rng: random.Random) -> Drawn:
    place = rng.choice(("STATION", "MUSEUM", "AIRPORT", "HARBOUR", "LIBRARY", "MARKET"))
    distance = rng.randint(1, 90)
    image, draw = _canvas((150, 190, 225))
    draw.rectangle((30, 90, 348, 230), fill=(20, 70, 140), outline=(255, 255, 255), width=6)
    draw.rectangle((180, 230, 198, 378), fill=(110, 110, 115))
    _write(draw, 60, 112, place, 44, (255, 255, 255))
    _write(draw, 60, 172, f"{distance} km", 36, (255, 255, 255))
    return _sample(
        image.filter(ImageFilter.GaussianBlur(rng.random())),
        ("What does the sign say?", f"{place} {distance} km"),
        ("كم يبعد المكان؟", f"{distance} كم"),
        ("Di che colore è il cartello?", "È blu."),
    )


def _table(rng: random.Random) -> Drawn:
    image, draw = _canvas((250, 250, 250))
    rows = rng.sample(_GOODS, 6)
    counts = {name: (rng.randint(1, 99), rng.randint(100, 999)) for name in rows}
    for column, title in enumerate(("Item", "Stock", "Code")):
        _write(draw, 20 + 120 * column, 20, title, 22)
    for line, (name, (stock, code)) in enumerate(counts.items()):
        y = 60 + 48 * line
        draw.line((12, y - 6, 366, y - 6), fill=(120, 120, 120))
        for column, cell in enumerate((name, str(stock), str(code))):
            _write(draw, 20 + 120 * column, y + 4, cell, 20)
    return _sample(
        image,
        (f"What is the code of {rows[0]}?", str(counts[rows[0]][1])),
        (f"Combien de {rows[1]} en stock ?", str(counts[rows[1]][0])),
        (f"Welche Zeile steht unter {rows[2]}?", rows[3]),
        (f"{rows[4]}的库存是多少？", str(counts[rows[4]][0])),
    )


def _scene(rng: random.Random) -> Drawn:
    """Sky, sun, hills and grain: smooth areas and texture, as in photographs."""
    noise = np.random.default_rng(rng.randrange(1 << 32))
    height = np.arange(_SIDE, dtype=np.float32)[:, None, None] / _SIDE
    sky = np.array([110, 160, 225], np.float32) * (1 - height) + 235 * height
    pixels = np.broadcast_to(sky, (_SIDE, _SIDE, 3)).copy()
    x = np.arange(_SIDE)
    for depth, colour in ((0.55, (90, 130, 90)), (0.7, (60, 110, 60)), (0.85, (80, 95, 50))):
        waves = [rng.uniform(10, 26) * np.sin(x / rng.uniform(25, 80) + rng.uniform(0, 6))]
        below = np.arange(_SIDE)[:, None] > depth * _SIDE + np.sum(waves, axis=0)[None, :]
        pixels[below] = colour
    pixels += noise.normal(0, 9, (_SIDE, _SIDE, 1)).astype(np.float32)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    left = rng.randint(30, 280)
    ImageDraw.Draw(image).ellipse((left, 40, left + 56, 96), fill=(255, 240, 190))
    side = ("left", "links", "左") if left < 160 else ("right", "rechts", "右")
    return _sample(
        image,
        ("Describe the picture.", "Green hills under a blue sky with a bright sun."),
        ("On which side is the sun?", f"On the {side[0]}."),
        ("Auf welcher Seite steht die Sonne?", f"Sie steht {side[1]}."),
        ("太阳在哪一边？", f"在{side[2]}边。"),
    )


_SENTENCES = (
    "The ferry leaves the harbour every morning at six.",
    "Rain is expected along the coast until Thursday.",
    "Visitors may leave their bags at the front desk.",
    "The bridge was closed for repairs in early spring.",
    "Each room has a desk, a lamp and two chairs.",
    "Our bakery opens earlier on market days.",
)


def _page(rng: random.Random) -> Drawn:
    image, draw = _canvas((252, 251, 247))
    chosen = rng.sample(_SENTENCES, 4)
    for paragraph, sentence in enumerate(chosen):
        words = sentence.split()
        half = len(words) // 2
        _write(draw, 20, 24 + 84 * paragraph, " ".join(words[:half]), 20)
        _write(draw, 20, 52 + 84 * paragraph, " ".join(words[half:]), 20)
    return _sample(
        image,
        ("Read the first sentence.", chosen[0]),
        ("Transcris la dernière phrase.", chosen[-1]),
        ("何文ありますか。", "四つです。"),
    )


def _canvas(
    colour: Colour, width: int = _SIDE, height: int = _SIDE
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), colour)
    return image, ImageDraw.Draw(image)


def _write(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, colour: Colour = _INK
) -> None:
    draw.text((x, y), text, fill=colour, font=ImageFont.load_default(size))


def _sample(image: Image.Image, *turns: tuple[str, str]) -> Drawn:
    return np.asarray(image), turns
