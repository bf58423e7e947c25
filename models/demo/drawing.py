"""Drawing: a supersampled canvas that remembers what it drew, things, and camera artefacts."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from models.demo.fonts import load_font

Rgb = tuple[int, int, int]
UInt8 = npt.NDArray[np.uint8]

SUPERSAMPLING = 2

PALETTE: dict[str, Rgb] = {
    "red": (214, 38, 40),
    "orange": (242, 135, 25),
    "yellow": (245, 215, 45),
    "green": (48, 158, 68),
    "blue": (42, 88, 208),
    "purple": (128, 56, 172),
    "pink": (246, 142, 188),
    "brown": (122, 72, 38),
    "black": (28, 28, 30),
    "white": (248, 248, 246),
}


@dataclass(frozen=True)
class Glyph:
    """A drawn character; the centre and height are fractions of the picture's sides."""

    char: str
    line: int
    x: float
    y: float
    height: float


@dataclass(frozen=True)
class Thing:
    """A drawn thing; centre and half size are in design pixels."""

    noun: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass
class Canvas:
    """A picture in the making.

    Coordinates are design pixels, about the pixels that the model sees of it; `zoom` native pixels
    are made of each.
    """

    width: int
    height: int
    zoom: float
    background: Rgb
    glyphs: list[Glyph] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    n_lines: int = 0

    def __post_init__(self) -> None:
        native = (round(self.width * self.zoom), round(self.height * self.zoom))
        self.image = Image.new(
            "RGB", (native[0] * SUPERSAMPLING, native[1] * SUPERSAMPLING), self.background
        )
        self.draw = ImageDraw.Draw(self.image)
        self.scale = self.zoom * SUPERSAMPLING

    def _scaled(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * self.scale, y * self.scale) for x, y in points]

    def polygon(self, points: list[tuple[float, float]], fill: Rgb) -> None:
        self.draw.polygon(self._scaled(points), fill=fill)

    def rectangle(
        self, box: tuple[float, float, float, float], fill: Rgb, radius: float = 0.0
    ) -> None:
        scaled = tuple(value * self.scale for value in box)
        if radius:
            self.draw.rounded_rectangle(scaled, radius * self.scale, fill=fill)
        else:
            self.draw.rectangle(scaled, fill=fill)

    def ellipse(self, box: tuple[float, float, float, float], fill: Rgb) -> None:
        self.draw.ellipse(tuple(value * self.scale for value in box), fill=fill)

    def ring(self, box: tuple[float, float, float, float], fill: Rgb, width: float) -> None:
        self.draw.ellipse(
            tuple(value * self.scale for value in box),
            outline=fill,
            width=max(1, round(width * self.scale)),
        )

    def line(self, points: list[tuple[float, float]], fill: Rgb, width: float) -> None:
        self.draw.line(self._scaled(points), fill=fill, width=max(1, round(width * self.scale)))

    def text_width(self, text: str, font: str, size: float) -> float:
        return load_font(font, max(4, round(size * self.scale))).getlength(text) / self.scale

    def text(
        self,
        position: tuple[float, float],
        text: str,
        font: str,
        size: float,
        fill: Rgb,
        anchor: str = "l",
    ) -> tuple[float, float, float, float]:
        """Write a line and remember where each character is.

        `position` is the left, middle or right end ("l", "m", "r") of the line's middle height.
        Returns the box (left, top, right, bottom) in design pixels.
        """
        loaded = load_font(font, max(4, round(size * self.scale)))
        width = loaded.getlength(text) / self.scale
        x, y = position
        left = x - {"l": 0.0, "m": width / 2, "r": width}[anchor]
        self.draw.text(
            (left * self.scale, y * self.scale), text, font=loaded, fill=fill, anchor="lm"
        )
        start = 0.0
        for index, char in enumerate(text):
            end = loaded.getlength(text[: index + 1]) / self.scale
            if char != " ":
                self.glyphs.append(
                    Glyph(
                        char,
                        self.n_lines,
                        (left + (start + end) / 2) / self.width,
                        y / self.height,
                        size / self.height,
                    )
                )
            start = end
        self.n_lines += 1
        return left, y - size * 0.6, left + width, y + size * 0.6

    def thing(self, noun: str, colour: str, fill: Rgb, x: float, y: float, radius: float) -> None:
        """Draw a thing that fits in a circle's square around (x, y) and remember it."""
        _draw_thing(self, noun, fill, x, y, radius)
        self.things.append(Thing(noun, colour, x, y, radius))


def shade(colour: Rgb, factor: float) -> Rgb:
    """Lighter (factor > 1) or darker."""
    if factor <= 1:
        r, g, b = (round(value * factor) for value in colour)
    else:
        r, g, b = (round(255 - (255 - value) / factor) for value in colour)
    return r, g, b


def jitter(rng: random.Random, colour: Rgb, amount: int = 14) -> Rgb:
    r, g, b = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return r, g, b


def distance(first: Rgb, second: Rgb) -> float:
    return math.dist(first, second)


def visible_colours(background: Rgb, minimum: float = 105.0) -> list[str]:
    """Names of the colours that stand out from the background."""
    return [name for name, rgb in PALETTE.items() if distance(rgb, background) > minimum]


def random_background(rng: random.Random) -> Rgb:
    """Mostly light neutrals and pastels, sometimes dark."""
    if rng.random() < 0.2:
        level = rng.randint(35, 80)
        return jitter(rng, (level, level, level), 10)
    level = rng.randint(205, 250)
    return jitter(rng, (level, level, level), 14)


def _star(x: float, y: float, r: float, angle: float) -> list[tuple[float, float]]:
    points = []
    for k in range(10):
        radius = r if k % 2 == 0 else r * 0.42
        turn = angle - math.pi / 2 + k * math.pi / 5
        points.append((x + radius * math.cos(turn), y + radius * math.sin(turn)))
    return points


def _heart(x: float, y: float, r: float) -> list[tuple[float, float]]:
    points = []
    for k in range(36):
        t = k * math.tau / 36
        px = 16 * math.sin(t) ** 3
        py = -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        points.append((x + px * r / 16.5, y + py * r / 16.5 - r * 0.1))
    return points


def _draw_shape(canvas: Canvas, noun: str, fill: Rgb, x: float, y: float, r: float) -> bool:
    match noun:
        case "circle":
            canvas.ellipse((x - r, y - r, x + r, y + r), fill)
        case "square":
            s = r * 0.86
            canvas.rectangle((x - s, y - s, x + s, y + s), fill)
        case "triangle":
            canvas.polygon([(x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)], fill)
        case "star":
            canvas.polygon(_star(x, y, r * 1.08, 0.0), fill)
        case "heart":
            canvas.polygon(_heart(x, y, r), fill)
        case "diamond":
            s = r * 0.72
            canvas.polygon([(x, y - r), (x + s, y), (x, y + r), (x - s, y)], fill)
        case "cross":
            s = r * 0.34
            canvas.rectangle((x - s, y - r, x + s, y + r), fill)
            canvas.rectangle((x - r, y - s, x + r, y + s), fill)
        case "ring":
            canvas.ring((x - r, y - r, x + r, y + r), fill, r * 0.36)
        case _:
            return False
    return True


def _draw_thing(canvas: Canvas, noun: str, fill: Rgb, x: float, y: float, r: float) -> None:
    if _draw_shape(canvas, noun, fill, x, y, r):
        return
    dark, light = shade(fill, 0.7), shade(fill, 1.6)
    grey, steel = (92, 94, 98), (150, 152, 156)
    match noun:
        case "cup":
            canvas.ring((x + r * 0.2, y - r * 0.4, x + r, y + r * 0.5), fill, r * 0.18)
            canvas.rectangle((x - r * 0.75, y - r * 0.75, x + r * 0.55, y + r * 0.9), fill, r * 0.2)
            canvas.ellipse((x - r * 0.75, y - r * 0.9, x + r * 0.55, y - r * 0.55), dark)
        case "bottle":
            canvas.rectangle((x - r * 0.16, y - r, x + r * 0.16, y - r * 0.2), fill)
            canvas.rectangle((x - r * 0.45, y - r * 0.35, x + r * 0.45, y + r), fill, r * 0.22)
            canvas.rectangle((x - r * 0.2, y - r, x + r * 0.2, y - r * 0.78), steel)
            canvas.rectangle((x - r * 0.45, y + r * 0.1, x + r * 0.45, y + r * 0.55), light)
        case "book":
            canvas.rectangle((x - r * 0.7, y - r * 0.95, x + r * 0.7, y + r * 0.95), fill, r * 0.08)
            canvas.rectangle((x - r * 0.7, y - r * 0.95, x - r * 0.45, y + r * 0.95), dark)
            canvas.rectangle((x - r * 0.2, y - r * 0.6, x + r * 0.45, y - r * 0.35), light)
            canvas.rectangle(
                (x - r * 0.65, y + r * 0.78, x + r * 0.7, y + r * 0.9), (238, 234, 222)
            )
        case "ball":
            canvas.ellipse((x - r, y - r, x + r, y + r), fill)
            canvas.draw.arc(
                tuple(v * canvas.scale for v in (x - r * 0.4, y - r, x + r * 1.6, y + r)),
                120, 240, fill=light, width=max(1, round(r * 0.16 * canvas.scale)),
            )  # fmt: skip
            canvas.draw.arc(
                tuple(v * canvas.scale for v in (x - r * 1.6, y - r, x + r * 0.4, y + r)),
                -60, 60, fill=light, width=max(1, round(r * 0.16 * canvas.scale)),
            )  # fmt: skip
        case "lamp":
            canvas.rectangle((x - r * 0.08, y - r * 0.1, x + r * 0.08, y + r * 0.85), grey)
            canvas.rectangle((x - r * 0.5, y + r * 0.8, x + r * 0.5, y + r), grey)
            canvas.polygon(
                [(x - r * 0.45, y - r), (x + r * 0.45, y - r), (x + r * 0.9, y + r * 0.15),
                 (x - r * 0.9, y + r * 0.15)], fill,
            )  # fmt: skip
        case "box":
            canvas.polygon(
                [(x - r, y - r * 0.45), (x - r * 0.6, y - r * 0.9), (x + r, y - r * 0.9),
                 (x + r * 0.6, y - r * 0.45)], light,
            )  # fmt: skip
            canvas.polygon(
                [(x + r * 0.6, y - r * 0.45), (x + r, y - r * 0.9), (x + r, y + r * 0.45),
                 (x + r * 0.6, y + r * 0.9)], dark,
            )  # fmt: skip
            canvas.rectangle((x - r, y - r * 0.45, x + r * 0.6, y + r * 0.9), fill)
        case "house":
            canvas.rectangle((x - r * 0.75, y - r * 0.2, x + r * 0.75, y + r), fill)
            canvas.polygon([(x - r, y - r * 0.2), (x, y - r), (x + r, y - r * 0.2)], grey)
            canvas.rectangle((x - r * 0.18, y + r * 0.35, x + r * 0.18, y + r), shade(fill, 0.45))
            for side in (-0.45, 0.45):
                left = x + r * (side - 0.13)
                canvas.rectangle((left, y, left + r * 0.26, y + r * 0.26), (225, 236, 244))
        case "car":
            canvas.polygon(
                [(x - r * 0.6, y), (x - r * 0.35, y - r * 0.5), (x + r * 0.3, y - r * 0.5),
                 (x + r * 0.6, y)], fill,
            )  # fmt: skip
            canvas.polygon(
                [(x - r * 0.4, y - r * 0.03), (x - r * 0.24, y - r * 0.37),
                 (x + r * 0.2, y - r * 0.37), (x + r * 0.38, y - r * 0.03)], (214, 230, 240),
            )  # fmt: skip
            canvas.rectangle((x - r, y - r * 0.05, x + r, y + r * 0.42), fill, r * 0.15)
            for side in (-0.55, 0.55):
                cx, cy, w = x + r * side, y + r * 0.42, r * 0.25
                canvas.ellipse((cx - w, cy - w, cx + w, cy + w), (46, 46, 50))
                canvas.ellipse((cx - w / 2, cy - w / 2, cx + w / 2, cy + w / 2), steel)
        case "tree":
            canvas.rectangle((x - r * 0.12, y + r * 0.2, x + r * 0.12, y + r), (104, 74, 50))
            for dx, dy in ((-0.35, 0.0), (0.35, 0.0), (0.0, -0.4)):
                cx, cy, w = x + r * dx, y + r * dy, r * 0.52
                canvas.ellipse((cx - w, cy - w, cx + w, cy + w), fill)
        case "boat":
            canvas.polygon(
                [(x - r, y + r * 0.25), (x + r, y + r * 0.25), (x + r * 0.65, y + r * 0.8),
                 (x - r * 0.65, y + r * 0.8)], fill,
            )  # fmt: skip
            canvas.rectangle((x - r * 0.06, y - r * 0.95, x + r * 0.06, y + r * 0.25), grey)
            canvas.polygon(
                [
                    (x + r * 0.12, y - r * 0.85),
                    (x + r * 0.8, y + r * 0.1),
                    (x + r * 0.12, y + r * 0.1),
                ],
                light,
            )
        case _:
            raise ValueError(f"nobody knows how to draw: {noun}")


@cache
def _noise_bank() -> npt.NDArray[np.int16]:
    """(1024, 1024) normal noise of standard deviation 16; windows of it are cheap."""
    values = np.random.default_rng(7).standard_normal((1024, 1024)) * 16
    return values.astype(np.int16)


def finish(rng: random.Random, canvas: Canvas, gentle: bool = False) -> UInt8:
    """Reduce to native size and add what a camera or a scan adds: (height, width, 3) uint8."""
    image = canvas.image.reduce(SUPERSAMPLING)
    if rng.random() < 0.25 and not gentle:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6) * canvas.zoom))
    noise = rng.choice((0, 0, 1, 2, 4, 6)) if not gentle else rng.choice((0, 0, 1))
    if noise:
        height, width = image.height, image.width
        bank = _noise_bank()
        y, x = rng.randrange(max(1, 1024 - height)), rng.randrange(max(1, 1024 - width))
        grain = bank[y : y + height, x : x + width]
        if grain.shape == (height, width):
            pixels = np.asarray(image, np.int16) + (grain * noise // 16)[:, :, None]
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.4 and not gentle:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(55, 95))
        image = Image.open(buffer)
    return np.array(image.convert("RGB"))
