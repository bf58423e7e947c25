"""Pictures with questions: what a quantized bundle is measured on, and calibrated with.

The built-in ones are drawn here, so nothing has to be shipped or downloaded: receipts, tables,
charts, shapes, signs, scenes and pages, each with a conversation in several languages whose answers
are known. A folder holds a user's own pictures, which always fit the purpose better.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from edge_vlm.errors import InputError
from edge_vlm.prompt.messages import Message, Text, user_message

BUILTIN = "builtin"
MAX_PICTURES = 64
MAX_TEXT_BYTES = 1 << 20
HELD_OUT = 4  # every fourth conversation is measured on, not calibrated with
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
_SIDE = 378  # pixels: one tile and the thumbnail with the released sizes

Turn = tuple[str, str | None]


@dataclass(frozen=True)
class Sample:
    """A picture (file, or (height, width, 3) uint8) and turns of question and answer."""

    picture: Path | npt.NDArray[np.uint8]
    turns: tuple[Turn, ...]

    @property
    def messages(self) -> list[Message]:
        """The conversation; it ends with the last answer that is known."""
        out: list[Message] = []
        for index, (question, answer) in enumerate(self.turns):
            out.append(user_message([] if index else [self.picture], question))
            if answer is None:
                break
            out.append(Message("assistant", (Text(answer),)))
        return out


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples to calibrate with, and held-out ones to measure on (none of a single sample)."""
    held_out = [s for index, s in enumerate(samples) if index % HELD_OUT == HELD_OUT - 1]
    if not held_out and len(samples) > 1:
        held_out = [samples[-1]]
    chosen = {id(sample) for sample in held_out}
    return [sample for sample in samples if id(sample) not in chosen], held_out


def read_samples(source: str | Path) -> list[Sample]:
    """``builtin``, or the pictures of a folder.

    ``questions.json`` in the folder is a list of objects with ``image`` (a file name), ``question``
    and perhaps ``answer``; ``NAME.txt`` beside a picture has a question a line, perhaps followed by
    a tab and the answer. A picture without questions gets general ones.

    Raises:
        InputError: the folder has no picture, or a file of questions is malformed.
    """
    if str(source) == BUILTIN:
        return builtin_samples()
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures (or {BUILTIN!r})")
    pictures = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not pictures:
        raise InputError(f"{folder}: has no picture (JPEG, PNG, WebP, BMP or GIF)")
    if len(pictures) > MAX_PICTURES:
        raise InputError(f"{folder}: has {len(pictures)} pictures, at most {MAX_PICTURES} are used")
    listed = _listed_questions(folder / "questions.json", {path.name for path in pictures})
    samples = []
    for index, path in enumerate(pictures):
        turns = listed.get(path.name, []) + _lines(path.with_suffix(".txt"))
        general = _GENERAL[index % len(_GENERAL)]
        samples.append(Sample(path, tuple(turns) or ((general, None),)))
    return samples


def _listed_questions(path: Path, pictures: set[str]) -> dict[str, list[Turn]]:
    if not path.exists():
        return {}
    try:
        data: Any = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(data, list):
        raise InputError(f"{path}: must be a list of objects with image, question and answer")
    found: dict[str, list[Turn]] = {}
    for index, entry in enumerate(data):
        fields = entry if isinstance(entry, dict) else {}
        image, question, answer = (fields.get(key) for key in ("image", "question", "answer"))
        if not isinstance(image, str) or not isinstance(question, str) or not question.strip():
            raise InputError(f"{path}: entry {index} lacks image or question")
        if answer is not None and not isinstance(answer, str):
            raise InputError(f"{path}: the answer of entry {index} is no text")
        if image not in pictures:
            raise InputError(f"{path}: entry {index} names {image!r}, which is no picture there")
        found.setdefault(image, []).append((question, answer))
    return found


def _lines(path: Path) -> list[Turn]:
    if not path.exists():
        return []
    turns: list[Turn] = []
    for line in _text(path).splitlines():
        question, _, answer = line.partition("\t")
        if question.strip():
            turns.append((question.strip(), answer.strip() or None))
    return turns


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise InputError(f"{path}: is larger than {MAX_TEXT_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text") from error


_GENERAL = (
    "Describe this picture.",
    "Was ist auf diesem Bild zu sehen?",
    "¿Qué se ve en esta imagen?",
    "Que voit-on sur cette image ?",
    "这张图片里有什么？",
    "ماذا يوجد في هذه الصورة؟",
    "この画像には何が写っていますか。",
    "Что изображено на этой картинке?",
    "이 사진에 무엇이 있나요?",
    "Cosa si vede in questa immagine?",
)


def builtin_samples(rounds: int = 4) -> list[Sample]:
    """``rounds`` times each kind of picture, always the same ones."""
    kinds: tuple[Callable[[random.Random], Sample], ...] = (
        _receipt,
        _chart,
        _shapes,
        _sign,
        _table,
        _scene,
        _page,
    )
    return [
        kind(random.Random(f"{kind.__name__} {n}"))  # noqa: S311 - the same pictures each time
        for n in range(rounds)
        for kind in kinds
    ]


_GOODS = ("Bread", "Milk", "Coffee", "Apples", "Rice", "Soap", "Cheese", "Tea", "Paper", "Lamp")
_COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 150, 70),
    "blue": (40, 80, 190),
    "yellow": (230, 200, 50),
    "black": (20, 20, 20),
}


def _receipt(rng: random.Random) -> Sample:
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


def _chart(rng: random.Random) -> Sample:
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


def _shapes(rng: random.Random) -> Sample:
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


def _sign(rng: random.Random) -> Sample:
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


def _table(rng: random.Random) -> Sample:
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


def _scene(rng: random.Random) -> Sample:
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


def _page(rng: random.Random) -> Sample:
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
    colour: tuple[int, int, int], width: int = _SIDE, height: int = _SIDE
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), colour)
    return image, ImageDraw.Draw(image)


def _write(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    size: int,
    colour: tuple[int, int, int] = (25, 25, 30),
) -> None:
    draw.text((x, y), text, fill=colour, font=ImageFont.load_default(size))


def _sample(image: Image.Image, *turns: Turn) -> Sample:
    return Sample(np.asarray(image), turns)
