"""Rotary positions as configurations tell them: in up to four places, which have to agree.

Sources: modeling_rope_utils.py and configuration_utils.py of transformers 4 and 5. Version 5 moved
``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` into ``rope_parameters``, which may
hold one object for each type of layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field, ValidationError, model_validator

from edge_vlm.bundle.json_text import explain, shorten, wrong
from edge_vlm_export.checkpoint.known_keys import Keys, Known

Theta = Annotated[float, Field(gt=0, le=1e12)]
Whole = Annotated[float, Field(ge=1, le=1)]
_FULL = "full_attention"
_LAYER_TYPES = (_FULL, "sliding_attention", "chunked_attention", "linear_attention")


class Rope(Known):
    """Rotary positions of every value of a head, without scaling."""

    harmless: ClassVar[Keys] = (
        "original_max_position_embeddings",
    )  # without scaling it says nothing

    rope_type: Literal["default"] = Field(
        default="default", validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: Theta | None = None
    partial_rotary_factor: Whole = 1.0
    factor: Whole = 1.0


class RotaryText(Known):
    """The keys of a language model that say how positions and layers attend.

    Every layer attends to all that came before.
    """

    rope_theta: Theta | None = None
    rope_parameters: dict[str, Any] = Field(default={})
    rope_scaling: dict[str, Any] = Field(default={})
    partial_rotary_factor: Whole = 1.0
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] = Field(default=[], max_length=1 << 10)

    @property
    def theta(self) -> float:
        """The base of the frequencies."""
        return next(theta for _, theta in self._thetas())

    def _thetas(self) -> Iterator[tuple[str, float]]:
        """Each place that tells it."""
        if self.rope_theta:
            yield "rope_theta", self.rope_theta
        for key, told in self._objects():
            theta = Rope.model_validate(told).rope_theta
            if theta:
                yield key, theta

    def _objects(self) -> Iterator[tuple[str, Any]]:
        """Each object about rotary positions by its key, those of layer types one by one."""
        for key in ("rope_parameters", "rope_scaling"):
            told = getattr(self, key)
            nested = {name: told[name] for name in _LAYER_TYPES if name in told}
            yield key, {name: value for name, value in told.items() if name not in nested}
            yield from ((f"{key}.{name}", value) for name, value in nested.items() if value)

    @model_validator(mode="after")
    def _positions_agree(self) -> RotaryText:
        for key, told in self._objects():
            try:
                Rope.model_validate(told)
            except ValidationError as error:
                raise wrong(key, told, f"of which {explain(error, told)}") from error
        thetas = list(self._thetas())
        if not thetas:
            raise wrong("rope_theta", None, "and rope_parameters has none either")
        (first, theta), *others = thetas
        for key, other in others:
            if other != theta:
                where = key if key.endswith("rope_theta") else f"{key}.rope_theta"
                raise wrong(where, other, f"which contradicts {first}: {shorten(theta)}")
        return self
