"""Fonts that installable packages ship, split into those for training and those held back."""

from __future__ import annotations

import importlib.util
import random
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

# package -> folder of its font files, and the files used
_TRAINING = {
    "matplotlib": (
        "mpl-data/fonts/ttf",
        "DejaVuSans.ttf DejaVuSans-Bold.ttf DejaVuSans-Oblique.ttf DejaVuSerif.ttf"
        " DejaVuSerif-Bold.ttf DejaVuSansMono.ttf DejaVuSansMono-Bold.ttf STIXGeneral.ttf"
        " STIXGeneralBol.ttf",
    ),
    "font_roboto": (
        "files",
        "Roboto-Regular.ttf Roboto-Medium.ttf Roboto-Bold.ttf Roboto-Black.ttf Roboto-Italic.ttf",
    ),
    "font_source_sans_pro": (
        "files",
        "SourceSansPro-Regular.ttf SourceSansPro-Semibold.ttf SourceSansPro-Bold.ttf"
        " SourceSansPro-It.ttf",
    ),
    "font_source_serif_pro": (
        "files",
        "SourceSerifPro-Regular.ttf SourceSerifPro-Semibold.ttf SourceSerifPro-Bold.ttf",
    ),
    "font_lato": ("files", "Lato-Regular.ttf Lato-Bold.ttf Lato-Black.ttf Lato-Italic.ttf"),
    "font_rhd": ("files", "RedHatDisplay-Medium.ttf RedHatDisplay-Bold.ttf"),
    "font_fjallaone": ("files", "FjallaOne-Regular.ttf"),
}
_HELD_BACK = {
    "font_manrope": ("files", "Manrope-Medium.ttf Manrope-SemiBold.ttf Manrope-Bold.ttf"),
    "font_hanken_grotesk": (
        "files",
        "HankenGrotesk-Regular.otf HankenGrotesk-Medium.otf HankenGrotesk-Bold.otf",
    ),
    "font_caladea": ("files", "Caladea-Regular.ttf Caladea-Bold.ttf"),
}


class MissingFontsError(RuntimeError):
    """A package that ships the generator's fonts is not installed."""


def _folder(package: str, subfolder: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise MissingFontsError(f"the fonts of {name} are needed: pip install {name}")
    return Path(next(iter(spec.submodule_search_locations))) / subfolder


@cache
def font_files(held_back: bool) -> list[str]:
    """Paths of the training fonts, or of those that training never sees."""
    table = _HELD_BACK if held_back else _TRAINING
    return [
        str(_folder(package, subfolder) / name)
        for package, (subfolder, names) in table.items()
        for name in names.split()
    ]


@lru_cache(maxsize=2048)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """The font at `size` pixels; basic layout is enough for Latin letters and much faster."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def pick_font(rng: random.Random, held_back: bool) -> str:
    """The path of a random font of one side of the split."""
    return rng.choice(font_files(held_back))
