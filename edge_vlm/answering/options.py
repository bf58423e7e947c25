"""What one call wants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import PromptError
from edge_vlm.planning.budget import DEFAULT_MAX_TOKENS

if TYPE_CHECKING:
    from edge_vlm.forms.structure import Form


@dataclass(frozen=True)
class AskOptions:
    """Options of one answer.

    Raises:
        PromptError: a value is out of its range; the message names it.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS  # of the answer
    temperature: float = 0.0  # 0 takes the likeliest token each time (greedy)
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    seed: int | None = None  # of the sampler; None draws one
    max_tiles: int | None = None  # crops besides the thumbnail; None for the model's maximum
    within: float | None = None  # seconds to the first token; limits tiles, needs a tuning
    system: str | None = None  # a system message in front of the conversation
    # What the answer must be; at most one of them.
    schema: Any = None  # JSON Schema as plain data, or a pydantic model or other type
    choices: Sequence[str] | None = None  # one of these, with the probability of each
    regex: str | None = None  # a full match of this pattern of Python's re
    form: Form | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, 1, 1 << 20)
        _check("temperature", self.temperature, 0, 100)
        _check("top_p", self.top_p, 0, 1)
        _check("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _check("seed", self.seed, 0, (1 << 32) - 1)
        if self.max_tiles is not None:
            _check("max_tiles", self.max_tiles, 1, 1024)
        if self.within is not None:
            _check("within", self.within, 1e-3, 1e6)
        if self.system is not None and not isinstance(self.system, str):
            raise PromptError("system: must be a string")
        wanted = [n for n in ("schema", "choices", "regex") if getattr(self, n) is not None]
        if len(wanted) > 1:
            raise PromptError(f"{wanted[0]} and {wanted[1]}: give one of them")
        if wanted:
            from edge_vlm.forms.structure import check_choices, form_of

            if self.choices is not None:
                object.__setattr__(self, "choices", check_choices(self.choices))
            object.__setattr__(self, "form", form_of(self.schema, self.regex))


def _check(name: str, value: float, low: float, high: float) -> None:
    whole = name not in ("temperature", "top_p", "min_p", "within")
    kinds = int if whole else (int, float)
    valid = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise PromptError(f"{name}: must be {kind} from {low} to {high}, not {value!r}")
