"""A JSON Schema is checked, and written as llguidance can compile it, and quickly."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any, NamedTuple

from edge_vlm.errors import PromptError
from edge_vlm.forms.formats import FORMATS
from edge_vlm.forms.numbers import narrow, short

_MAX_NESTING = 50
_MAX_PARTS = 2000  # llguidance's time grows with their square
_MAX_VALUES = 10_000  # of one enum; likewise
_MAX_ORDERS = 2000  # of a set's values: six of them have 1,957
_MAX_PATTERNS = 8  # beside allOf, which may ask for an automaton that meets all of them
_MAX_MULTIPLE = 10_000  # its automaton has as many states
_MAX_TRIALS = 60  # to say where in a schema llguidance finds a fault
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref"}
_OPEN = {"additionalProperties", "patternProperties"}
_DATA = {"enum", "const", "default", "examples"}  # no schemas in there
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # a schema for each name
_REFUSED = {"contains", "not", "if", "then", "else", "propertyNames"}  # with schemas in them
_SHARED = "edge-vlm-"
_NOTES = {"title", "description", "default", "examples", "deprecated", "$comment"}
_TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value % 1 == 0


def _are_schemas(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _is_schema_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_schema, value))


# What a keyword's value has to be.
_KEYWORDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (
        lambda value: bool(value) and {*(value if _is_texts(value) else [str(value)])} <= {*_TYPES},
        f"{', '.join(_TYPES)}, or a list of them",
    ),
    **dict.fromkeys(("required",), (_is_texts, "a list of names")),
    **dict.fromkeys(("enum",), (lambda value: isinstance(value, list), "a list of values")),
    **dict.fromkeys(
        ("pattern", "format", "$ref", "$anchor", "$id", "$schema"),
        (lambda value: isinstance(value, str), "a string"),
    ),
    **dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (_is_number, "a number")
    ),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(
        [f"{end}{what}" for end in ("min", "max") for what in ("Length", "Items", "Properties")],
        (_is_count, "a whole number from 0 on"),
    ),
    **dict.fromkeys(_NAMED, (_are_schemas, "an object of schemas")),
    **dict.fromkeys(
        ("allOf", "anyOf", "oneOf", "prefixItems"), (_is_schema_list, "a list of schemas")
    ),
    "additionalProperties": (_is_schema, "a schema"),
    "items": (lambda value: _is_schema(value) or _is_schema_list(value), "a schema"),
    "uniqueItems": (lambda value: isinstance(value, bool), "true or false"),
}


class _Part(NamedTuple):
    where: str  # a JSON pointer
    schema: dict[str, Any]
    is_combined: bool  # whether others beside it restrict the same value
    is_sure: bool = True  # not below a keyword that is not known


def prepare(schema: dict[str, Any]) -> tuple[bytes, ...]:
    """Check a schema, close the objects that list their properties, write sets out.

    Args:
        schema: plain data, which is changed.

    Returns:
        Literal parts of its patterns.

    Raises:
        PromptError: it is not valid, too large, or would be taken for another one.
    """
    parts: list[_Part] = []
    _collect(_Part("#", schema, False), 0, schema, parts)
    patterns = [part.schema["pattern"] for part in parts if "pattern" in part.schema]
    if len(patterns) > _MAX_PATTERNS and any("allOf" in part.schema for part in parts):
        raise PromptError(f"schema: has more than {_MAX_PATTERNS} patterns and allOf beside them")
    # What is combined with others has to stay open for the others' properties.
    combined = {
        part["$ref"]
        for _, part, is_combined, _ in parts
        if "$ref" in part
        and (is_combined or len(part.keys() & {*_COMBINING, *_OPEN, "properties", "required"}) > 1)
    }
    for where, part, is_combined, _ in parts:
        is_open = is_combined or where in combined
        try:
            narrow(part, is_open)
        except PromptError as error:
            raise _wrong(where, str(error)) from error
        is_plain = "properties" in part and not part.keys() & (_COMBINING | _OPEN)
        if is_plain and not is_open and "#" not in combined:
            part["additionalProperties"] = False
            for name in part.get("required", ()):
                part["properties"].setdefault(name, {})
    alone = [p.schema for p in parts if not p.is_combined and p.where not in combined]
    _share(schema, alone)
    return tuple(hint for pattern in patterns[:_MAX_PATTERNS] for hint in literals(pattern))


def literals(pattern: str) -> tuple[bytes, ...]:
    """Parts of a regular expression that are most likely meant to the letter."""
    found = re.findall(r"[^\\^$.|?*+()\[\]{}\s]{2,}", pattern)
    return tuple(text.encode() for text in found[:_MAX_PATTERNS])


def place_of(
    schema: dict[str, Any], fault: Callable[[dict[str, Any]], str | None]
) -> tuple[str, dict[str, Any]]:
    """The smallest part of a schema that has the fault which the whole has, and where it is."""
    wanted = fault(schema)
    where, part, n_left, seen = "#", schema, _MAX_TRIALS, {"#"}
    names: dict[str, Any] = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
    while True:
        target = part.get("$ref")
        inner = [_Part(target, _target(schema, target), False)] if target in _inside(part) else []
        for child in (*inner, *_children(_Part(where, part, False))):
            n_left -= 1
            if n_left < 0 or child.where in seen or _SHARED in child.where:
                continue
            seen.add(child.where)
            if fault({**names, **child.schema}) == wanted:
                where, part = child.where, child.schema
                break
        else:
            return where, part


def contradiction(part: dict[str, Any]) -> str:
    """Why nothing is valid under a schema, where that is simple to see; nothing otherwise."""
    for low, high in (
        ("minimum", "maximum"),
        ("minLength", "maxLength"),
        ("minItems", "maxItems"),
        ("minProperties", "maxProperties"),
    ):
        if part.get(low, -math.inf) > part.get(high, math.inf):
            return f"{low} {short(part[low])} is more than {high} {short(part[high])}"
    values = part["enum"] if "enum" in part else [part["const"]] if "const" in part else None
    types = part.get("type")
    if values == []:
        return "the enum is empty"
    if values is not None and types:
        return f"no value of its enum or const is of type {json.dumps(types)}"
    return ""


def _wrong(where: str, words: str) -> PromptError:
    words = words.removeprefix("schema: ")
    return PromptError(f"schema: {words}" if where == "#" else f"schema: {where}: {words}")


def _inside(part: dict[str, Any]) -> tuple[str, ...]:
    target = part.get("$ref")
    return (target,) if isinstance(target, str) and target.startswith("#/") else ()


def _target(schema: dict[str, Any], pointer: str) -> dict[str, Any]:
    found: Any = schema
    for name in pointer.split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _children(part: _Part) -> Iterator[_Part]:
    """The schemas right inside one."""
    has_names = bool(part.schema.keys() & {"properties", "required"})
    for key, inner in part.schema.items():
        both = key in _COMBINING and (part.is_combined or key == "allOf" or has_names)
        if key in _DATA:
            continue
        if isinstance(inner, list):
            named: Any = enumerate(inner)
        elif key in _NAMED and isinstance(inner, dict):
            named = inner.items()
        else:
            named = [(None, inner)]
        for name, value in named:
            if isinstance(value, dict):
                escaped = str(name).replace("~", "~0").replace("/", "~1")
                end = "" if name is None else f"/{escaped}"
                is_sure = part.is_sure and (key in _KEYWORDS or key in _REFUSED)
                yield _Part(f"{part.where}/{key}{end}", value, both, is_sure)


def _collect(part: _Part, depth: int, whole: dict[str, Any], found: list[_Part]) -> None:
    """Check a schema and those inside, and write them as llguidance takes them."""
    if depth > _MAX_NESTING:
        raise PromptError(f"schema: is nested more than {_MAX_NESTING} deep")
    try:
        _check(part)
    except PromptError:
        if part.is_sure:
            raise
        return  # no schema
    found.append(part)
    if len(found) > _MAX_PARTS:
        raise PromptError(f"schema: has more than {_MAX_PARTS} parts")
    _write(part, whole)
    for child in _children(part):
        _collect(child, depth + 1, whole, found)


def _check(part: _Part) -> None:
    """Check the values of one schema's keywords.

    Raises:
        PromptError: one has another type or is too large.
    """
    where, schema = part.where, part.schema
    for key in schema.keys() & _KEYWORDS:
        is_right, words = _KEYWORDS[key]
        if not is_right(schema[key]):
            raise _wrong(f"{where}/{key}", f"must be {words}, not {short(schema[key])}")
    if schema.get("multipleOf", 0) > _MAX_MULTIPLE:
        raise _wrong(f"{where}/multipleOf", f"is more than {_MAX_MULTIPLE}")
    if len(schema.get("enum", ())) > _MAX_VALUES:
        raise _wrong(where, f"the enum has more than {_MAX_VALUES} values")


def _write(part: _Part, whole: dict[str, Any]) -> None:
    """Write alternatives of constants as an enum, formats as patterns, sets as their orders."""
    schema = part.schema
    for key in ("oneOf", "anyOf"):
        entries = schema.get(key, ())
        is_alone = not schema.keys() & {"enum", "const", "properties", "required"}
        are_constants = (isinstance(e, dict) and e.keys() - _NOTES == {"const"} for e in entries)
        if len(entries) > 1 and is_alone and all(are_constants):
            schema["enum"] = _distinct([entry["const"] for entry in entries])
            del schema[key]
            _check(part)
    if (name := schema.get("format")) in FORMATS and "pattern" not in schema:
        del schema["format"]
        schema |= {"pattern": FORMATS[name]} if FORMATS[name] else {}
    if schema.pop("uniqueItems", False):
        _write_set(part, whole)


def _write_set(part: _Part, whole: dict[str, Any]) -> None:
    """A schema with ``uniqueItems`` as one without."""
    where, schema = part.where, part.schema
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if (types != [None] and "array" not in types) or schema.get("maxItems", 2) < 2:
        return
    if "enum" in schema or "const" in schema:
        values = schema.pop("enum", None) or [schema.pop("const")]
        schema["enum"] = [v for v in values if not isinstance(v, list) or v == _distinct(v)]
        return
    values = _values(schema.get("items"), whole, 0)
    others = [name for name in types if name not in ("array", "null")]
    if values is None or others or "prefixItems" in schema:
        reason = "is enforced for an array of a few values alone: enum, booleans, a short range"
        raise _wrong(f"{where}/uniqueItems", reason)
    low = int(schema.get("minItems", 0))
    high = int(min(schema.get("maxItems", len(values)), len(values)))
    n = sum(math.perm(len(values), length) for length in range(low, high + 1))
    if n > _MAX_ORDERS:
        reason = f"{len(values)} values have {n if n < 10**9 else 'too many'} orders, more than "
        raise _wrong(
            f"{where}/uniqueItems", f"{reason}{_MAX_ORDERS}; set maxItems, or leave it out"
        )
    orders = [[*o] for length in range(low, high + 1) for o in permutations(values, length)]
    for key in ("type", "items", "minItems", "maxItems"):
        schema.pop(key, None)
    schema["enum"] = [*orders, *([None] if "null" in types else [])]


def _values(items: Any, whole: dict[str, Any], depth: int) -> list[Any] | None:
    """All values that are valid under a schema; None where they are not few or not plain."""
    if not isinstance(items, dict) or depth > 8:
        return None
    kind = items.keys() - _NOTES
    if kind == {"$ref"} and _inside(items):
        return _values(_target(whole, items["$ref"]), whole, depth + 1)
    if "const" in items and kind <= {"const", "type"}:
        return [items["const"]]
    if isinstance(items.get("enum"), list) and kind <= {"enum", "type"}:
        return _distinct(items["enum"])
    if len(kind) == 1 and kind & {"anyOf", "oneOf", "allOf"}:
        key = next(iter(kind))
        entries = items[key]
        if isinstance(entries, list) and (key != "allOf" or len(entries) == 1):
            found = [_values(entry, whole, depth + 1) for entry in entries]
            if all(values is not None for values in found):
                return _distinct([value for values in found for value in values or ()])
    if kind == {"type"} and items["type"] in ("boolean", "null"):
        return [True, False] if items["type"] == "boolean" else [None]
    bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    is_range = items.get("type") == "integer" and kind <= {"type", *bounds}
    if is_range and all(_is_number(items[bound]) for bound in kind & bounds):
        low = max(
            items.get("minimum", -1e300), math.floor(items.get("exclusiveMinimum", -1e300)) + 1
        )
        high = min(items.get("maximum", 1e300), math.ceil(items.get("exclusiveMaximum", 1e300)) - 1)
        if high - low <= _MAX_ORDERS:
            return list(range(math.ceil(low), math.floor(high) + 1))
    return None


def _distinct(values: list[Any]) -> list[Any]:
    """Values less those that JSON has as equal: 1 and 1.0, not 1 and true."""

    def key(value: Any) -> Any:
        if isinstance(value, dict):
            return ("object", frozenset((name, key(inner)) for name, inner in value.items()))
        if isinstance(value, list):
            return ("array", *map(key, value))
        return (isinstance(value, bool), value)

    return list({key(value): value for value in reversed(values)}.values())[::-1]


def _share(schema: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Let equal texts and numbers be one: llguidance compiles every one of them anew."""
    if any("$id" in part for part in parts):
        return
    plain = [
        (part, json.dumps({k: v for k, v in part.items() if k not in _NOTES}, sort_keys=True))
        for part in parts[1:]
        if part.get("type") in ("string", "number", "integer")
        and not part.keys() & {*_COMBINING, *_NAMED, "$anchor"}
    ]
    counts = Counter(text for _, text in plain)
    names: dict[str, str] = {}
    for part, text in plain:
        if counts[text] > 2:
            names.setdefault(text, f"{_SHARED}{len(names)}")
            part.clear()
            part["$ref"] = f"#/$defs/{names[text]}"
    if names:
        shared = {name: json.loads(text) for text, name in names.items()}
        schema["$defs"] = {**schema.get("$defs", {}), **shared}
