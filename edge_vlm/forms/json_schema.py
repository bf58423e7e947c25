"""JSON Schema as a language: texts that are JSON and valid under the schema.

Covered is the part of draft 2020-12 that describes a form; a keyword that would restrict the answer
and is not covered is refused by name. An answer has the properties that the schema lists, in its
order, and no others. Recursion goes as deep as ``_DEPTHS`` allows and ends where it can.
https://json-schema.org/draft/2020-12/json-schema-validation
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from edge_vlm.errors import PromptError
from edge_vlm.forms.decimals import between
from edge_vlm.forms.languages import EMPTY, Languages, Ranges, without
from edge_vlm.forms.regex import RegexCompiler

MAX_SCHEMA_BYTES = 1 << 20
_MAX_SUBSCHEMAS = 20_000
_MAX_NESTING = 40  # of the schema itself
_DEPTHS = (6, 4, 3, 2, 1)  # of a recursive reference, and of "any value": the deepest that fits
_LARGEST = Fraction(10**15 - 1)  # of a number; float64 holds such whole numbers exactly
_FRACTION_DIGITS = 15
_MAX_COUNT = 100_000  # of minLength, maxItems and the like

_ANNOTATIONS = """
    $schema $id $anchor $comment $defs definitions title description default examples deprecated
    readOnly writeOnly discriminator contentEncoding contentMediaType
"""
_IGNORED = frozenset(_ANNOTATIONS.split())
_TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")
_OF_TYPE = {
    "string": "minLength maxLength pattern format",
    "number": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
    "integer": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
    "boolean": "",
    "null": "",
    "object": "properties required additionalProperties minProperties maxProperties",
    "array": "items prefixItems minItems maxItems uniqueItems",
}
_COVERED = frozenset(
    " ".join([*_OF_TYPE.values(), "type enum const anyOf oneOf allOf $ref"]).split()
)
_DATE = (
    r"[12]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)"
    r"|02-(0[1-9]|1\d|2[0-8]))"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+){{0,4}}@({_LABEL}\.){{1,4}}[A-Za-z]{{2,10}}",
    "uri": rf"https?://({_LABEL}\.){{1,4}}[A-Za-z]{{2,10}}(/[A-Za-z0-9._~-]*){{0,16}}",
    "password": None,  # says how to show the text, not what it is
}


def schema_language(languages: Languages, schema: Any) -> int:
    """The language of a schema given as plain data.

    Raises:
        PromptError: the schema is not valid, uses what is not covered, or is too large; the
            message says where.
    """
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"schema: is not JSON ({error})") from error
    if size > MAX_SCHEMA_BYTES:
        raise PromptError(f"schema: is larger than {MAX_SCHEMA_BYTES >> 10} KiB")
    for depth in _DEPTHS:
        try:
            language = _Compiler(languages, schema, depth).compile(schema, "schema", 0)
            break
        except _TooLargeError as error:
            if depth == _DEPTHS[-1]:
                raise PromptError(f"{error}: the schema is too large") from error
    if language == EMPTY:
        raise PromptError("schema: nothing is valid under it")
    return language


class _TooLargeError(Exception):
    pass


class _Compiler:
    def __init__(self, languages: Languages, root: Any, depth: int) -> None:
        self._languages = languages
        self._root = root
        self._depth = depth
        self._n_subschemas = 0
        self._open: dict[str, int] = {}  # references being followed
        self._done: dict[tuple[str, tuple[tuple[str, int], ...]], int] = {}
        self._any: dict[int, int] = {}
        characters = self.characters([(0, 0x10FFFF)])
        self._text = languages.repeat(characters, 0, None)

    def compile(self, schema: Any, where: str, nesting: int) -> int:
        self._n_subschemas += 1
        if self._n_subschemas > _MAX_SUBSCHEMAS or nesting > _MAX_NESTING:
            raise _TooLargeError(where)
        if schema is True or schema == {}:
            return self._any_value(min(self._depth, 3))
        if schema is False:
            return EMPTY
        if not isinstance(schema, Mapping):
            raise PromptError(f"{where}: must be an object, true or false")
        for keyword in schema:
            if keyword not in _COVERED and keyword not in _IGNORED:
                if keyword.startswith("x-"):
                    continue
                raise PromptError(f"{where}: the keyword {keyword!r} is not supported")
        active = {key for key in schema if key in _COVERED}
        if not active:
            return self._any_value(min(self._depth, 3))
        for combining in ("$ref", "allOf", "anyOf", "oneOf", "const", "enum"):
            if combining in active:
                return self._combined(combining, schema, active, where, nesting)
        return self._typed(schema, active, where, nesting)

    def _combined(
        self, keyword: str, schema: Mapping[str, Any], active: set[str], where: str, nesting: int
    ) -> int:
        value = schema[keyword]
        inside = f"{where}.{keyword}"
        if keyword in ("const", "enum"):
            values = [value] if keyword == "const" else value
            if not isinstance(values, list) or not values:
                raise PromptError(f"{inside}: must be a list of at least one value")
            others = active - {keyword, "type"}
            types = schema.get("type", list(_TYPES))
            types = [types] if isinstance(types, str) else types
            if not others:
                kept = [v for v in values if any(_is_of_type(v, t) for t in types)]
                return self._languages.either(map(self._constant, kept))
        elif keyword == "$ref":
            others = active - {"$ref"}
            if not others:
                return self._reference(value, inside, nesting)
        else:
            if not isinstance(value, list) or not value:
                raise PromptError(f"{inside}: must be a list of at least one schema")
            others = active - {keyword, "type"}
            if not others and (keyword != "allOf" or len(value) == 1):
                if keyword == "oneOf":
                    self._check_disjoint(value, inside)
                return self._branches(value, inside, nesting)
            if not others:
                raise PromptError(f"{inside}: more than one schema is not supported")
        raise _clash(where, keyword, min(others))

    def _branches(self, schemas: Sequence[Any], where: str, nesting: int) -> int:
        """Any of the schemas; one that is not covered is left out if another remains."""
        found, failure = [], None
        for index, schema in enumerate(schemas):
            try:
                found.append(self.compile(schema, f"{where}[{index}]", nesting + 1))
            except PromptError as error:
                failure = error
        if failure and not any(found):
            raise failure
        return self._languages.either(found)

    def _check_disjoint(self, schemas: Sequence[Any], where: str) -> None:
        resolved = [self._resolved(schema, where) for schema in schemas]
        for i, first in enumerate(resolved):
            for j, second in enumerate(resolved[:i]):
                if not _disjoint(first, second):
                    raise PromptError(
                        f"{where}: a value may be valid under both [{j}] and [{i}]; use anyOf"
                    )

    def _resolved(self, schema: Any, where: str) -> Mapping[str, Any]:
        for _ in range(10):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._target(schema["$ref"], where)
        return schema if isinstance(schema, Mapping) else {}

    def _target(self, reference: Any, where: str) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise PromptError(f"{where}: only references inside the schema ('#/...') are followed")
        target = self._root
        for part in reference[1:].split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, Mapping) and name in target:
                target = target[name]
            elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            else:
                raise PromptError(f"{where}: {reference} is not in the schema")
        return target

    def _reference(self, reference: Any, where: str, nesting: int) -> int:
        target = self._target(reference, where)
        depth = self._open.get(reference, 0)
        if depth >= self._depth:
            return EMPTY
        key = (reference, tuple(sorted(self._open.items())))
        if key not in self._done:
            self._open[reference] = depth + 1
            try:
                self._done[key] = self.compile(target, reference, nesting + 1 if depth == 0 else 0)
            finally:
                self._open[reference] = depth
                if depth == 0:
                    del self._open[reference]
        return self._done[key]

    def _typed(self, schema: Mapping[str, Any], active: set[str], where: str, nesting: int) -> int:
        types = schema.get("type")
        if types is None:
            meant = [t for t in _TYPES if active & set(_OF_TYPE[t].split())]
            types = [meant[0]]
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, list) or not types or not all(t in _TYPES for t in types):
            raise PromptError(
                f"{where}.type: must be one of {', '.join(_TYPES)}, or a list of them"
            )
        build: dict[str, Callable[[Mapping[str, Any], str, int], int]] = {
            "string": self._string,
            "number": self._number,
            "integer": self._integer,
            "boolean": lambda *_: self._languages.either(map(self._constant, (True, False))),
            "null": lambda *_: self._constant(None),
            "object": self._object,
            "array": self._array,
        }
        return self._languages.either(build[t](schema, where, nesting) for t in types)

    # Values.

    def characters(self, ranges: Ranges) -> int:
        """One character inside a JSON string."""
        languages = self._languages
        special = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)]
        escaped = [
            languages.literal(json.dumps(chr(c))[1:-1].encode())
            for c in (*range(0x20), 0x22, 0x5C)
            if any(low <= c <= high for low, high in ranges)
        ]
        return languages.either([languages.characters(without(ranges, special)), *escaped])

    def _constant(self, value: Any) -> int:
        text = json.dumps(value, ensure_ascii=False)
        if any("\ud800" <= c <= "\udfff" for c in text):
            text = json.dumps(value)
        return self._languages.literal(text.encode())

    def _quoted(self, content: int) -> int:
        quote = self._languages.literal(b'"')
        return self._languages.sequence([quote, content, quote])

    def _string(self, schema: Mapping[str, Any], where: str, nesting: int) -> int:
        low, high = self._counts(schema, "minLength", "maxLength", where)
        counted = low > 0 or high is not None
        pattern = schema.get("pattern")
        name = schema.get("format")
        if sum((pattern is not None, name is not None and _FORMATS.get(name, "") is not None)) > 1:
            raise _clash(where, "pattern", "format")
        if name is not None:
            if name not in _FORMATS:
                known = ", ".join(sorted(_FORMATS))
                raise PromptError(f"{where}.format: must be one of {known}, not {name!r}")
            pattern = pattern if _FORMATS[name] is None else f"^({_FORMATS[name]})$"
        if pattern is None:
            characters = self.characters([(0, 0x10FFFF)])
            return self._quoted(self._languages.repeat(characters, low, high))
        if not isinstance(pattern, str):
            raise PromptError(f"{where}.pattern: must be a string")
        if counted:
            raise _clash(where, "pattern" if name is None else "format", "minLength or maxLength")
        compiler = RegexCompiler(self._languages, self.characters, re.ASCII)
        try:
            return self._quoted(compiler.compile(pattern, search=True))
        except PromptError as error:
            raise PromptError(f"{where}.pattern: {error}") from error

    def _integer(self, schema: Mapping[str, Any], where: str, nesting: int) -> int:
        return self._numeric(schema, where, 0)

    def _number(self, schema: Mapping[str, Any], where: str, nesting: int) -> int:
        return self._numeric(schema, where, _FRACTION_DIGITS)

    def _numeric(self, schema: Mapping[str, Any], where: str, n_fraction: int) -> int:
        if schema.get("multipleOf", 1) != 1 or ("multipleOf" in schema and n_fraction):
            raise PromptError(f"{where}: the keyword 'multipleOf' is not supported")
        bounds: dict[str, Fraction] = {}
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            value = schema.get(keyword)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise PromptError(f"{where}.{keyword}: must be a number")
                bounds[keyword] = Fraction(str(value))
        low, low_open = max(
            (-_LARGEST, False),
            (bounds.get("minimum", -_LARGEST), False),
            (bounds.get("exclusiveMinimum", -_LARGEST - 1), True),
        )
        high, high_closed = min(
            (_LARGEST, True),
            (bounds.get("maximum", _LARGEST), True),
            (bounds.get("exclusiveMaximum", _LARGEST + 1), False),
        )
        if n_fraction == 0:  # an open bound of whole numbers is the next one, closed
            low = Fraction(math.floor(low) + 1 if low_open else math.ceil(low))
            high = Fraction(math.floor(high) if high_closed else math.ceil(high) - 1)
            low_open, high_closed = False, True
        try:
            return between(
                self._languages,
                low,
                high,
                low_open=low_open,
                high_open=not high_closed,
                n_fraction=n_fraction,
            )
        except ValueError as error:
            raise PromptError(f"{where}: {error}") from error

    def _any_value(self, depth: int) -> int:
        if depth not in self._any:
            parts = [
                self._quoted(self._text),
                between(self._languages, -_LARGEST, _LARGEST, n_fraction=_FRACTION_DIGITS),
                *map(self._constant, (True, False, None)),
            ]
            inner = self._any_value(depth - 1) if depth > 0 else EMPTY
            parts.append(self._list([], inner, 0, None))
            parts.append(self._map(inner, 0, None))
            self._any[depth] = self._languages.either(parts)
        return self._any[depth]

    def _array(self, schema: Mapping[str, Any], where: str, nesting: int) -> int:
        if schema.get("uniqueItems") not in (None, False):
            raise PromptError(f"{where}: the keyword 'uniqueItems' is not supported")
        low, high = self._counts(schema, "minItems", "maxItems", where)
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise PromptError(f"{where}.prefixItems: must be a list of schemas")
        first = [
            self.compile(item, f"{where}.prefixItems[{i}]", nesting + 1)
            for i, item in enumerate(prefix)
        ]
        if high is not None and high <= len(first):
            rest = EMPTY
        elif "items" in schema:
            rest = self.compile(schema["items"], f"{where}.items", nesting + 1)
        else:
            rest = EMPTY if first else self._any_value(1)
        return self._list(first[:high], rest, low, high)

    def _list(self, first: list[int], rest: int, low: int, high: int | None) -> int:
        languages = self._languages
        more = languages.repeat(
            languages.sequence([self._comma(), rest]),
            max(low - max(len(first), 1), 0),
            None if high is None else max(high - max(len(first), 1), 0),
        )
        if not first:
            content = languages.sequence([rest, more]) if high != 0 else EMPTY
            content = languages.optional(content) if low == 0 else content
        else:
            content = more
            for index in range(len(first) - 1, -1, -1):
                begin = [self._comma()] if index else []
                content = languages.sequence([*begin, first[index], content])
                if low <= index:
                    content = languages.optional(content)
        return languages.sequence([languages.literal(b"["), content, languages.literal(b"]")])

    def _object(self, schema: Mapping[str, Any], where: str, nesting: int) -> int:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise PromptError(f"{where}.properties: must be an object of schemas")
        if not isinstance(required, list) or not all(isinstance(r, str) for r in required):
            raise PromptError(f"{where}.required: must be a list of names")
        additional = schema.get("additionalProperties", True)
        low, high = self._counts(schema, "minProperties", "maxProperties", where)
        missing = [name for name in required if name not in properties]
        if missing and additional is False:
            return EMPTY
        if not properties and not missing:
            value = EMPTY
            if additional is not False and high != 0:
                value = (
                    self._any_value(1)
                    if additional in (True, {})
                    else self.compile(additional, f"{where}.additionalProperties", nesting + 1)
                )
            if low > 1:
                raise PromptError(f"{where}.minProperties: more than 1 is not supported here")
            return self._map(value, low, high)
        if low > len(set(required)) or (high is not None and high < len(properties) + len(missing)):
            keyword = "minProperties" if low > len(set(required)) else "maxProperties"
            raise _clash(where, keyword, "properties")
        members = [
            (name, self.compile(value, f"{where}.properties.{name}", nesting + 1), name in required)
            for name, value in properties.items()
        ]
        for name in missing:
            value = self.compile(additional, f"{where}.additionalProperties", nesting + 1)
            members.append((name, value, True))
        return self._members(members)

    def _members(self, members: list[tuple[str, int, bool]]) -> int:
        """An object of these members in this order: (name, value, whether it must be there)."""
        languages = self._languages
        # What may follow: nothing was written so far, or a member was.
        first = after = languages.literal(b"}")
        for name, value, required in reversed(members):
            member = languages.sequence([self._constant(name), self._colon(), value])
            with_first = languages.sequence([member, after])
            with_after = languages.sequence([self._comma(), member, after])
            first = with_first if required else languages.either([with_first, first])
            after = with_after if required else languages.either([with_after, after])
        return languages.sequence([languages.literal(b"{"), first])

    def _map(self, value: int, low: int, high: int | None) -> int:
        languages = self._languages
        member = languages.sequence([self._quoted(self._text), self._colon(), value])
        more = (
            languages.repeat(
                languages.sequence([self._comma(), member]), 0, None if high is None else high - 1
            )
            if high != 0
            else EMPTY
        )
        content = languages.sequence([member, more])
        if low == 0:
            content = languages.optional(content)
        return languages.sequence([languages.literal(b"{"), content, languages.literal(b"}")])

    def _comma(self) -> int:
        return self._separator(b",")

    def _colon(self) -> int:
        return self._separator(b":")

    def _separator(self, mark: bytes) -> int:
        languages = self._languages
        return languages.sequence(
            [languages.literal(mark), languages.optional(languages.literal(b" "))]
        )

    def _counts(
        self, schema: Mapping[str, Any], low_name: str, high_name: str, where: str
    ) -> tuple[int, int | None]:
        for name in (low_name, high_name):
            value = schema.get(name, 0)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 0 <= value <= _MAX_COUNT:
                raise PromptError(f"{where}.{name}: must be a whole number up to {_MAX_COUNT}")
        low: int = schema.get(low_name, 0)
        high: int | None = schema.get(high_name)
        if high is not None and high < low:
            raise PromptError(f"{where}.{high_name}: is less than {low_name}")
        return low, high


def _clash(where: str, first: str, second: str) -> PromptError:
    return PromptError(f"{where}: {first!r} together with {second!r} is not supported")


def _is_of_type(value: Any, name: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return bool(name == ("null" if value is None else "boolean"))
    if isinstance(value, int | float):
        return name == "number" or (name == "integer" and value == int(value))
    kinds = {"string": str, "object": dict, "array": list}
    return name in kinds and isinstance(value, kinds[name])


def _disjoint(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether it is plain that no value is valid under both schemas."""
    ours, theirs = _types_of(first), _types_of(second)
    both = ours & theirs
    if not both and not (ours | theirs) >= {"integer", "number"}:
        return True
    constants = _constants(first), _constants(second)
    if constants[0] and constants[1]:
        return not constants[0] & constants[1]
    if both != {"object"}:
        return False
    shared = set(first.get("required", ())) & set(second.get("required", ()))
    members = first.get("properties", {}), second.get("properties", {})
    for name in shared & set(members[0]) & set(members[1]):
        left, right = _constants(members[0][name]), _constants(members[1][name])
        if left and right and not left & right:
            return True
    return False


def _types_of(schema: Mapping[str, Any]) -> set[str]:
    types = schema.get("type", _TYPES)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values:
        types = [t for t in _TYPES if any(_is_of_type(value, t) for value in values)]
    return {types} if isinstance(types, str) else set(types)


def _constants(schema: Any) -> set[str]:
    """The values of const or enum as texts; none where there is neither."""
    if not isinstance(schema, Mapping):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum", ())
    return {json.dumps(value, sort_keys=True) for value in values}
