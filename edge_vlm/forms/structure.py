"""What an answer must be: JSON of a schema, or a match of a pattern.

Schemas and patterns are compiled by llguidance; what it supports is supported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from edge_vlm.errors import DecoderError, PromptError
from edge_vlm.forms.numbers import narrow
from edge_vlm.forms.vocabulary import byte_matcher

MAX_SCHEMA_BYTES = 1 << 20
_MAX_NESTING = 50
_MAX_SUBSCHEMAS = 2000  # llguidance's time grows with their square
_MAX_VALUES = 10_000  # of one enum; likewise
_MAX_PATTERNS = 8  # beside allOf, which may ask for an automaton that meets all of them
_MAX_MULTIPLE = 10_000  # its automaton has as many states
_MAX_REGEX = 5000  # characters
# Compact JSON, with a space after a comma or colon if the model likes.
_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "coerce_one_of": True,
    "lenient": False,
}
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref"}
_OPEN = {"additionalProperties", "patternProperties"}
_DATA = {"enum", "const", "default", "examples"}  # no schemas in there
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # a schema for each name


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
        schema = adapter.json_schema()
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
        text = json.dumps(schema, allow_nan=False)
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
    hints = _prepare(schema)
    return _checked("schema", f"%json {json.dumps({**schema, 'x-guidance': _STYLE})}", hints)


@lru_cache(maxsize=8)
def _of_regex(pattern: str) -> tuple[str, tuple[bytes, ...]]:
    if len(pattern) > _MAX_REGEX:
        raise PromptError(f"regex: has more than {_MAX_REGEX} characters")
    try:
        re.compile(pattern)
        pattern.encode()
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise PromptError(f"regex: is not a valid regular expression ({error})") from error
    rust = pattern[:-1] + "z" if re.search(r"(?<!\\)(\\\\)*\\Z$", pattern) else pattern
    quoted = re.sub(r"(?s)\\/|(\\.)|/", lambda found: found[1] or r"\/", rust)
    return _checked("regex", f"/{quoted}/" if rust else '""', _literals(pattern))


def _checked(what: str, rule: str, hints: tuple[bytes, ...]) -> tuple[str, tuple[bytes, ...]]:
    """The same, if llguidance takes it and something is valid under it."""
    try:
        matcher = byte_matcher(rule, "")
    except PromptError as error:
        raise PromptError(f"{what}: {error}") from error
    if not matcher.is_accepting() and not any(matcher.compute_bitmask()[:32]):
        raise PromptError(f"{what}: nothing is valid under it")
    return rule, hints


def _literals(pattern: str) -> tuple[bytes, ...]:
    found = re.findall(r"[^\\^$.|?*+()\[\]{}\s]{2,}", pattern)
    return tuple(text.encode() for text in found[:_MAX_PATTERNS])


def _prepare(schema: dict[str, Any]) -> tuple[bytes, ...]:
    """Check a schema's size, and close the objects that list their properties.

    Returns:
        Literal parts of its patterns.
    """
    parts = list(_subschemas(schema, False, 0))
    patterns = [part["pattern"] for part, _ in parts if isinstance(part.get("pattern"), str)]
    if len(patterns) > _MAX_PATTERNS and any("allOf" in part for part, _ in parts):
        raise PromptError(f"schema: has more than {_MAX_PATTERNS} patterns and allOf beside them")
    # What is combined with others has to stay open for the others' properties.
    combined = {
        part["$ref"]
        for part, is_combined in parts
        if isinstance(part.get("$ref"), str)
        and (is_combined or len(part.keys() & {*_COMBINING, *_OPEN, "properties", "required"}) > 1)
    }
    open_ids = {
        id(value)
        for key in ("$defs", "definitions")
        if isinstance(schema.get(key), dict)
        for name, value in schema[key].items()
        if f"#/{key}/{name}" in combined
    }
    for part, is_combined in parts:
        multiple = part.get("multipleOf")
        if isinstance(multiple, int | float) and multiple > _MAX_MULTIPLE:
            raise PromptError(f"schema: multipleOf {multiple} is more than {_MAX_MULTIPLE}")
        if isinstance(part.get("enum"), list) and len(part["enum"]) > _MAX_VALUES:
            raise PromptError(f"schema: an enum has more than {_MAX_VALUES} values")
        narrow(part, is_combined or id(part) in open_ids)
        names, required = part.get("properties"), part.get("required", [])
        is_plain = isinstance(names, dict) and not part.keys() & (_COMBINING | _OPEN)
        if is_plain and not is_combined and id(part) not in open_ids and "#" not in combined:
            part["additionalProperties"] = False
            for name in required if isinstance(required, list) else ():
                part["properties"].setdefault(name, {})
    return tuple(hint for pattern in patterns[:_MAX_PATTERNS] for hint in _literals(pattern))


def _subschemas(
    value: Any, is_combined: bool, depth: int, found: list[int] | None = None
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each schema in a schema, and whether others beside it restrict the same value."""
    found = [0] if found is None else found
    if depth > _MAX_NESTING:
        raise PromptError(f"schema: is nested more than {_MAX_NESTING} deep")
    if isinstance(value, list):
        for entry in value:
            yield from _subschemas(entry, is_combined, depth, found)
    if not isinstance(value, dict):
        return
    found[0] += 1
    if found[0] > _MAX_SUBSCHEMAS:
        raise PromptError(f"schema: has more than {_MAX_SUBSCHEMAS} parts")
    yield value, is_combined
    has_names = bool(value.keys() & {"properties", "required"})
    for key, inner in value.items():
        if key in _NAMED and isinstance(inner, dict):
            yield from _subschemas(list(inner.values()), False, depth + 1, found)
        elif key in ("allOf", "anyOf", "oneOf"):
            both = is_combined or key == "allOf" or has_names
            yield from _subschemas(inner, both, depth + 1, found)
        elif key not in _DATA:
            yield from _subschemas(inner, False, depth + 1, found)
