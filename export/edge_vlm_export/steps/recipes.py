"""Recipes: what ``edge-vlm export`` chooses for a kind of device, in ``models/recipes/*.toml``.

A file holds options of ``edge-vlm export``, options of ``edge-vlm ask`` that suit the device, the
reason, and what the released model then takes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_vlm.bundle.json_text import decode, first_problem, read_bounded
from edge_vlm.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_RECIPE_BYTES = 1 << 16
PICTURE = (2728, 2046)  # width and height of the picture that ``Expected`` is about

_INSTALLED = Path(__file__).parents[1] / "_recipes"
_SOURCE = Path(__file__).parents[3] / "models" / "recipes"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Ask(_Part):
    """Options of ``edge-vlm ask``."""

    max_tiles: int | None = Field(default=None, ge=1, le=1024)
    residency: Literal["together", "in-turns"] | None = None
    kv_type: Literal["f16", "q8_0", "q4_0"] | None = None
    provider: Literal["cuda", "tensorrt", "coreml", "qnn", "openvino", "xnnpack"] | None = None
    gpu_layers: Literal["all"] | None = None

    def arguments(self) -> list[str]:
        """As written on a command line."""
        chosen = self.model_dump(exclude_none=True)
        pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in chosen.items()]
        return [word for pair in pairs for word in pair]


class Expected(_Part):
    """What the released model takes in MB (10^6 bytes): computed from its sizes.

    Memory is the peak while a question about a picture of twelve tiles (or the recipe's
    ``max_tiles``) is answered with up to 512 tokens.
    """

    processor: Literal["arm", "x86"]
    vision_mb: int = Field(ge=1)
    decoder_mb: int = Field(ge=1)
    memory_mb: int = Field(ge=1)


class Recipe(_Part):
    """One file."""

    title: str = Field(min_length=1, max_length=100)
    why: str = Field(min_length=1, max_length=2000)
    vision: Literal["int8", "int8-static", "int4", "fp16", "fp32"]
    target: Literal["cpu", "portable"]
    decoder: Literal["q4_k_m", "q4_0", "q5_k_m", "q6_k", "q8_0", "iq4_xs", "f16", "bf16", "f32"]
    decoder_head: str | None = None
    decoder_embedding: str | None = None
    calibrate: Literal["builtin"] | None = None
    min_cosine: float | None = Field(default=None, gt=0, lt=1)
    ask: Ask = Ask()
    expected: Expected

    def options(self) -> dict[str, Any]:
        """Options of ``edge-vlm export`` by the names of their parameters."""
        return self.model_dump(exclude={"title", "why", "ask", "expected"}, exclude_none=True)


def recipe_names() -> list[str]:
    """Names that ``read_recipe`` knows."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def read_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a file whose name ends in ``.toml``.

    Raises:
        InputError: there is none, or the file is no valid recipe.
    """
    names = recipe_names()
    path = _folder() / f"{name}.toml" if name in names else Path(name)
    if name not in names and path.suffix != ".toml":
        raise InputError(f"recipe: {name!r} is none of {', '.join(names)} and no .toml file")
    try:
        text = decode(read_bounded(path, MAX_RECIPE_BYTES, InputError), path, InputError)
        return Recipe.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid TOML ({error})") from error


def listing() -> str:
    """All recipes, for people."""
    lines = []
    for name in recipe_names():
        recipe = read_recipe(name)
        sizes = recipe.expected
        chosen = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in recipe.options().items())
        lines += [
            f"{name}: {recipe.title}",
            f"  {chosen}",
            f"  vision {sizes.vision_mb} MB, decoder {sizes.decoder_mb} MB,"
            f" {sizes.memory_mb / 1000:.1f} GB of memory for a picture of"
            f" {PICTURE[0]}x{PICTURE[1]} pixels",
        ]
        if words := recipe.ask.arguments():
            lines.append(f"  then: edge-vlm ask {' '.join(words)}")
        lines += [f"  {line}" for line in recipe.why.strip().splitlines()] + [""]
    lines.append("Sizes are those of the released jina-vlm, computed from its architecture.")
    return "\n".join(lines)


def _folder() -> Path:
    return _INSTALLED if _INSTALLED.is_dir() else _SOURCE
