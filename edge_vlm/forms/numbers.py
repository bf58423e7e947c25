"""Numbers in a JSON Schema: what llguidance would allow too much, or not write as it was given."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from edge_vlm.errors import PromptError

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LARGEST = 10**15 - 1
_TINY = 1e-10


def narrow(schema: dict[str, Any], is_combined: bool) -> None:
    """Bounds for what may be a number, and an end to its digits, which some models do not find.

    Without both bounds llguidance allows exponents, and so numbers that cannot be read again.

    Args:
        schema: one schema, which is changed.
        is_combined: a value is valid under others, too.

    Raises:
        PromptError: llguidance, which has numbers as float64, would write another one.
    """
    bounds = [schema.get(keyword, math.nan) for keyword in _BOUNDS]
    if not all(isinstance(bound, int | float) for bound in bounds):
        return  # llguidance says so
    todo = [schema.get("const"), schema.get("enum"), *(b for b in bounds if abs(b) <= _LARGEST)]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list):
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int | float) and not _is_exact(value):
            raise PromptError(f"schema: {short(value)} has more digits than a number of 64 bits")
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if not {"number", "integer"} & {*map(str, types)} or schema.keys() & {"const", "enum"}:
        return
    low, high, over, under = bounds
    for bound in (low, over, -high, -under):
        if bound > _LARGEST:
            raise PromptError(
                f"schema: {short(abs(bound))} is beyond the 15 digits that numbers have"
            )
    low, high = max(-_LARGEST, low), min(_LARGEST, high)
    # An open bound that is whole would be taken for a closed one where the other is near.
    if "number" in types and over >= 0 and over % 1 == 0 and min(high, under) < over + 1:
        low = max(low, float(f"{over + _TINY * max(over, 1):.15g}"))
    if "number" in types and under <= 0 and under % 1 == 0 and max(low, over) > under - 1:
        high = min(high, float(f"{under - _TINY * max(-under, 1):.15g}"))
    schema |= {"minimum": low, "maximum": high}
    for keyword in _BOUNDS[2:]:
        if abs(schema.get(keyword, 0)) > _LARGEST:
            del schema[keyword]
    # Of near bounds, not all multiples between them would be found.
    if "number" in types and not is_combined and high - low > 1:
        schema.setdefault("multipleOf", _TINY)


def short(value: Any) -> str:
    """A value as it is shown in an error."""
    text = json.dumps(value, default=repr)
    if len(text) > 40 and isinstance(value, int):
        return f"a number of {len(text.lstrip('-'))} digits"
    return text if len(text) <= 40 else f"{text[:30]}..."


def _is_exact(number: float) -> bool:
    if isinstance(number, int) or number.is_integer():
        return abs(number) <= 1 << 53
    digits = Decimal(repr(number)).as_tuple()
    return len(digits.digits) <= 15 and int(digits.exponent) >= -15
