"""What an answer must be: JSON of a schema, or a match of a pattern.

Schemas and patterns are compiled by llguidance; what it supports is supported.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from edge_vlm.errors import DecoderError, PromptError
from edge_vlm.forms.ending import in_order
from edge_vlm.forms.formats import generator
from edge_vlm.forms.schema import contradiction, literals, place_of, prepare
from edge_vlm.forms.vocabulary import NOTHING, byte_matcher, reason

MAX_SCHEMA_BYTES = 1 << 20
_MAX_REGEX = 5000  # characters
# Compact JSON, with a space after a comma or colon if the model likes.
_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "coerce_one_of": True,
    "lenient": False,
}


@dataclass(frozen=True)
class Form:
    """A form that answers have, and how a text of that form is read."""

    rule: str  # the right side of a rule in llguidance's Lark grammars
    hints: tuple[bytes, ...] = ()  # literal parts of its patterns
    _parse: Callable[[str], Any] | None = None  # none for a form without values

    def parse(self, text: str) -> Any:
        """The value that a text of this form stands for; None for a form without values.

        Raises:
            DecoderError: ``max_tokens`` has cut it, or a validator of the caller's refuses it.
        """
        return self._parse(text) if self._parse else None


def form_of(schema: Any, regex: str | None) -> Form | None:
    """The form that a call asks for.

    Raises:
        PromptError: it is not valid, not supported or too large.
    """
    if schema is not None:
        if isinstance(schema, Mapping | bool):
            return Form(*_of_schema(_canonical(schema)), _loads)
        if isinstance(schema, str | bytes | int | float | Sequence):
            raise PromptError("schema: must be an object, true or false")
        return _typed_form(schema)
    if regex is not None:
        if not isinstance(regex, str):
            raise PromptError("regex: must be a string")
        return Form(*_of_regex(regex))
    return None


def _typed_form(wanted: Any) -> Form:
    """The form of a pydantic model, or of any other type that pydantic describes."""
    import pydantic

    try:
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(wanted)
        schema = adapter.json_schema(schema_generator=generator())
    except pydantic.errors.PydanticUserError as error:
        line = str(error).splitlines()[0]
        raise PromptError(f"schema: pydantic finds no JSON Schema for it ({line})") from error
    name = getattr(wanted, "__name__", "the schema")

    def parse(text: str) -> Any:
        try:
            return adapter.validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DecoderError(
                f"{name} refuses the answer {text[:200]}: {where}: {first['msg']}"
            ) from error

    return Form(*_of_schema(_canonical(schema)), parse)


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DecoderError(f"the answer cannot be read as JSON ({error}): {text[:200]}") from error


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:40]} is too large")
    return number


def _canonical(schema: Any) -> str:
    try:
        json.dumps(schema, ensure_ascii=False).encode()
        text = json.dumps(schema, allow_nan=False)
    except UnicodeEncodeError as error:
        raise PromptError("schema: holds half a character (a lone surrogate)") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"schema: is not JSON ({error})") from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise PromptError(f"schema: is larger than {MAX_SCHEMA_BYTES >> 10} KiB")
    return text


@lru_cache(maxsize=8)
def _of_schema(text: str) -> tuple[str, tuple[bytes, ...]]:
    schema = json.loads(text)
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    hints = prepare(schema)
    try:
        return _checked(_rule(schema), hints)
    except PromptError as error:
        words = str(error)
        is_whole = "too big" in words or "too complex" in words
        where, part = ("#", schema) if is_whole else place_of(schema, _fault)
        if words == NOTHING and (why := contradiction(part)):
            words = f"{words}: {why}"
        raise PromptError(f"schema: {words if where == '#' else f'{where}: {words}'}") from error


def _rule(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _STYLE})}"


def _fault(schema: dict[str, Any]) -> str | None:
    try:
        _checked(_rule(schema), ())
    except PromptError as error:
        return str(error)
    return None


@lru_cache(maxsize=8)
def _of_regex(pattern: str) -> tuple[str, tuple[bytes, ...]]:
    if len(pattern) > _MAX_REGEX:
        raise PromptError(f"regex: has more than {_MAX_REGEX} characters")
    if count := re.search(r"\{(?:\d*,)?(\d{10,})", pattern):
        raise PromptError(f"regex: a count of {len(count[1])} digits is too large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that another syntax would read differently
            re.compile(pattern)
        pattern.encode()
    except UnicodeEncodeError as error:
        raise PromptError("regex: holds half a character (a lone surrogate)") from error
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise PromptError(f"regex: is not a valid regular expression ({error})") from error
    rust = pattern[:-1] + "z" if re.search(r"(?<!\\)(\\\\)*\\Z$", pattern) else pattern
    quoted = re.sub(r"(?s)\\/|(\\.)|/", lambda found: found[1] or r"\/", rust)
    try:
        return _checked(f"/{quoted}/" if rust else '""', literals(pattern))
    except PromptError as error:
        raise PromptError(f"regex: {error}") from error


def _checked(rule: str, hints: tuple[bytes, ...]) -> tuple[str, tuple[bytes, ...]]:
    """The same, if llguidance takes it and something is valid under it."""
    matcher = byte_matcher(rule)
    first = next(iter(in_order(matcher.compute_bitmask()[:32])), None)
    if first is None and not matcher.is_accepting():
        raise PromptError(NOTHING)
    # What it is forced to say may be millions of bytes, and too much; only now it says so.
    if first is not None and not matcher.consume_token(first):
        raise PromptError(f"is too complex ({reason(matcher)})")
    return rule, hints
