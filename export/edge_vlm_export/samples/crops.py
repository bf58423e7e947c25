"""Tiles to calibrate and measure with: pictures drawn here, or those of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from edge_vlm.errors import InputError
from edge_vlm.families.base import Tiles
from edge_vlm.pictures.image import load_image
from edge_vlm_export.checkpoint.tensors import Float32
from edge_vlm_export.families.opened import Description

BUILTIN = "builtin"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MAX_FILES = 10_000
QUICK_TILES = 2  # measured with when no calibration was asked for
CALIBRATION_TILES = 16
_WORDS = "receipt total date 2024 paper street open Montag señal 3.50 % north invoice été 17:45"
_SIZE = 512

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CalibrationTiles:
    """Crops of several pictures."""

    crops: Float32  # (n, n_patches, patch_values), none of them blank
    extras: Mapping[str, npt.NDArray[Any]]  # (n,) each, as in the picture each crop comes from

    @property
    def feed(self) -> dict[str, npt.NDArray[Any]]:
        """All inputs of the graph."""
        return {"crops": self.crops, **self.extras}

    def first(self, n: int) -> CalibrationTiles:
        """At most ``n`` of them."""
        extras = {name: values[:n] for name, values in self.extras.items()}
        return CalibrationTiles(self.crops[:n], extras)

    def __len__(self) -> int:
        return len(self.crops)


def chosen_tiles(calibrate: str | Path | None, model: Description) -> CalibrationTiles:
    """As many as an export uses with this choice of ``calibrate``.

    Raises:
        InputError, ImageError: see ``calibration_tiles``.
    """
    limit = CALIBRATION_TILES if calibrate else QUICK_TILES
    return calibration_tiles(calibrate or BUILTIN, model, limit)


def calibration_tiles(source: str | Path, model: Description, limit: int) -> CalibrationTiles:
    """Up to ``limit`` tiles of the pictures in a folder, or of drawn ones (``builtin``).

    Pictures take turns, so that few tiles still show many of them: first the thumbnail of each,
    then a crop of each, and so on.

    Raises:
        InputError: the folder does not exist or has no pictures.
        ImageError: a picture cannot be read.
    """
    if str(source) == BUILTIN:
        return cut_pictures(builtin_pictures(), model, limit)
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of calibration pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"{folder}: has no pictures ({', '.join(SUFFIXES)})")
    return cut_pictures((load_image(path) for path in paths[:MAX_FILES]), model, limit)


def cut_pictures(pictures: Iterable[UInt8], model: Description, limit: int) -> CalibrationTiles:
    """Up to ``limit`` tiles of pictures (height, width, 3), taken in turns, blank ones left out.

    Raises:
        InputError: no tile is left.
    """
    family, processor = model.family, model.settings.image_processor
    turns: list[list[tuple[Tiles, int]]] = []
    for picture in pictures:
        tiles = family.runtime.cut(picture, processor)
        useful = [index for index, crop in enumerate(tiles.crops) if not family.is_blank(crop)]
        # No picture can have more turns than the whole is to have tiles.
        for turn, index in enumerate(useful[:limit]):
            if turn == len(turns):
                turns.append([])
            if sum(map(len, turns[: turn + 1])) < limit:
                turns[turn].append((tiles, index))
        if turns and len(turns[0]) >= limit:
            break
    chosen = [tile for turn in turns for tile in turn][:limit]
    if not chosen:
        raise InputError("calibration: every tile of the pictures is black")
    names = family.runtime.extras
    return CalibrationTiles(
        np.stack([tiles.crops[index] for tiles, index in chosen]),
        {name: np.stack([tiles.extras[name][index] for tiles, index in chosen]) for name in names},
    )


def builtin_pictures() -> Iterator[UInt8]:
    """Eight drawn pictures: print, shapes, textures, and all of it together; always the same."""
    rng = np.random.default_rng(0)
    for index in range(8):
        kind = index % 4
        picture = _texture(rng) if kind in (2, 3) else Image.new("RGB", (_SIZE, _SIZE), "white")
        if kind in (1, 3):
            _shapes(picture, rng)
        if kind in (0, 3):
            _print(picture, rng)
        yield np.asarray(picture)


def _print(picture: Image.Image, rng: np.random.Generator) -> None:
    """Lines of words in several sizes."""
    draw = ImageDraw.Draw(picture)
    words = _WORDS.split()
    y = int(rng.integers(4, 24))
    while y < _SIZE:
        size = int(rng.choice([11, 14, 18, 24, 36]))
        line = " ".join(rng.choice(words, 12))
        level = int(rng.integers(0, 110))
        font = ImageFont.load_default(size)
        draw.text((int(rng.integers(4, 60)), y), line, (level, level, level), font)
        y += int(size * 1.5)


def _shapes(picture: Image.Image, rng: np.random.Generator) -> None:
    """Filled and outlined shapes in strong colours, as in charts and signs."""
    draw = ImageDraw.Draw(picture)
    for _ in range(24):
        x, y = rng.integers(-40, _SIZE, 2).tolist()
        width, height = rng.integers(12, 220, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        box = (x, y, x + width, y + height)
        (draw.ellipse, draw.rectangle)[int(rng.integers(2))](box, colour, "black")
        draw.line((x, y + height, x + width, y), colour[::-1], int(rng.integers(1, 7)))


def _texture(rng: np.random.Generator) -> Image.Image:
    """Noise with the spectrum of photographs: amplitude falls with frequency."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(_SIZE), np.fft.fftfreq(_SIZE)))
    spectrum = 1 / np.maximum(frequency, 1 / _SIZE) ** 1.1
    channels = []
    for _ in range(3):
        noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((_SIZE, _SIZE))) * spectrum).real
        channels.append(128 + 52 * noise / noise.std())
    pixels = np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))
