"""What every part of a manifest has in common: nothing unknown, nothing converted, one line."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A part of ``bundle.json``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("contains a character that cannot be printed")
    return text


Printable = Annotated[str, AfterValidator(_printable)]

Count = Annotated[int, Field(ge=1, le=1 << 20)]
Margin = Annotated[int, Field(ge=0, le=1 << 10)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 24)]
Pair = tuple[Count, Count]
SpecialText = Annotated[str, Field(min_length=1, max_length=200)]
