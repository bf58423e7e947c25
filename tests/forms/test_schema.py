"""What people ask for: types of pydantic, sets, large schemas; where a schema is wrong, and why."""

from __future__ import annotations

import decimal
import enum
import ipaddress
import itertools
import json
import pathlib
import time
import uuid
import warnings
from collections.abc import Callable
from datetime import date, datetime, timedelta
from datetime import time as clock
from fractions import Fraction
from typing import Annotated, Any, Literal

import jsonschema
import pydantic
import pytest

from edge_vlm import PromptError
from edge_vlm.forms.choices import check_choices
from edge_vlm.forms.constraint import Constraint
from edge_vlm.forms.ending import ends
from edge_vlm.forms.structure import Form, form_of
from edge_vlm.forms.vocabulary import byte_matcher
from tests.forms.toy import VOCABULARY, answer

FIELD = pathlib.Path(__file__).parents[1] / "field"


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


def form(schema: Any, regex: str | None = None) -> Form:
    found = form_of(schema, regex)
    assert found is not None
    return found


def accepts(schema: Any, text: str) -> bool:
    return ends(byte_matcher(form(schema).rule), text.encode())


# Types.

TYPES: list[Any] = [
    *(pydantic.HttpUrl, pydantic.AnyUrl, pydantic.AnyHttpUrl, pydantic.WebsocketUrl),
    *(pydantic.FileUrl, pydantic.FtpUrl, pydantic.PostgresDsn, pydantic.RedisDsn),
    *(pydantic.MongoDsn, pydantic.HttpUrl | None),
    *(pydantic.UUID1, pydantic.UUID3, pydantic.UUID4, pydantic.UUID5, uuid.UUID),
    *(pydantic.IPvAnyAddress, pydantic.IPvAnyInterface, pydantic.IPvAnyNetwork),
    *(ipaddress.IPv4Address, ipaddress.IPv4Interface, ipaddress.IPv4Network),
    *(ipaddress.IPv6Address, ipaddress.IPv6Interface, ipaddress.IPv6Network),
    *(date, datetime, clock, timedelta, pydantic.AwareDatetime, pydantic.NaiveDatetime),
    *(decimal.Decimal, pydantic.condecimal(ge=0, le=10), complex, Fraction),
    pydantic.condecimal(max_digits=5, decimal_places=2),
    *(bytes, pydantic.SecretStr, pathlib.Path),
    pydantic.constr(strip_whitespace=True, min_length=2),
    pydantic.constr(pattern=r"^\d{4}$", max_length=4),
    *(set[Color], set[Literal["a", "b"]], frozenset[bool], set[Color | None]),
    set[Annotated[int, pydantic.Field(ge=1, le=3)]],
]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_what_pydantic_describes_it_takes(kind: Any) -> None:
    found = form(kind)
    for seed in range(4):
        found.parse(answer(found, 70 + 8 * seed, seed).text)


@pytest.mark.parametrize(
    ("kind", "texts", "others"),
    [
        (pydantic.HttpUrl, ["https://a.example/b?c=d", "http://u:p@h:80/"], ["ftp://a", "a.b/c"]),
        (pydantic.UUID4, ["0a1b2c3d-0000-4000-8000-000000000000"], [f"{uuid.UUID(int=0)}"]),
        (pydantic.IPvAnyAddress, ["127.0.0.1", "::1", "fe80::1:2", "::"], ["256.0.0.1", "1::2::3"]),
        (ipaddress.IPv4Network, ["10.0.0.0/8", "10.1.128.0/17", "1.2.3.4"], ["10.0.0.1/8"]),
        (date, ["2024-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2023-04-31"]),
        (datetime, ["2024-01-01T23:59:59Z", "2024-01-01T00:00:00"], ["2024-01-01T00:00:60Z"]),
        (pydantic.AwareDatetime, ["2024-01-01T00:00:00+01:00"], ["2024-01-01T00:00:00"]),
        (timedelta, ["PT1H30M", "P2D", "-P1DT2S"], ["P", "PT", "P1Y"]),
    ],
    ids=str,
)
def test_texts_of_a_type(kind: Any, texts: list[str], others: list[str]) -> None:
    for text in texts:
        assert accepts(kind, json.dumps(text)), text
        form(kind).parse(json.dumps(text))
    for text in others:
        assert not accepts(kind, json.dumps(text)), text


def test_text_that_holds_json_is_refused_with_what_to_do() -> None:
    with pytest.raises(PromptError, match="use its type"):
        form(pydantic.Json[int])


# Sets.

LIST = {"type": "array", "uniqueItems": True}
SETS: list[Any] = [
    json.loads((FIELD / "schema-unique.json").read_text()),
    {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 1},
    {
        "type": "array",
        "items": {"type": "integer", "minimum": 1, "maximum": 3},
        "uniqueItems": True,
    },
    {
        "type": "array",
        "items": {"type": "integer", "exclusiveMinimum": 0.5, "exclusiveMaximum": 3},
        "uniqueItems": True,
        "minItems": 2,
    },
    {"type": ["array", "null"], "items": {"const": "x"}, "uniqueItems": True},
    {"type": "array", "items": {"oneOf": [{"const": 1}, {"const": 2}]}, "uniqueItems": True},
    {"enum": [[1, 1], [1, 2], "x"], "uniqueItems": True},
    {"type": "array", "items": {"enum": [*range(12)]}, "uniqueItems": True, "maxItems": 2},
    {"allOf": [{"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, {"minItems": 2}]},
    {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "maxItems": 1},
    {"type": "string", "uniqueItems": True},
]


@pytest.mark.parametrize("schema", SETS, ids=str)
def test_a_set_has_each_value_once(schema: Any) -> None:
    found = form(schema)
    for seed in range(3):
        jsonschema.validate(json.loads(answer(found, 60, seed).text), schema)
    if schema.get("items", {}).get("maximum") == 3:
        every = [[*o] for n in range(4) for o in itertools.permutations((1, 2, 3), n)]
        assert all(accepts(schema, json.dumps(order)) for order in every)
        assert not accepts(schema, "[1,1]")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        {"type": "array", "items": {"enum": [*range(30)]}, "uniqueItems": True},
        {"type": "array", "uniqueItems": True},
        {"items": {"enum": [1, 2]}, "type": ["array", "string"], "uniqueItems": True},
    ],
    ids=str,
)
def test_larger_sets_are_refused_with_the_reason_and_where(schema: Any) -> None:
    with pytest.raises(PromptError, match=r"^schema: #/properties/a/uniqueItems: .*(orders|few)"):
        form({"properties": {"a": schema}})


# Size.

INTEGER = {"type": "integer"}
LINK = {"type": "string", "format": "uri"}
LARGE: dict[str, Callable[[], Any]] = {
    "texts": lambda: {"properties": {f"p{i}": {"type": "string"} for i in range(1990)}},
    "numbers": lambda: {
        "properties": {f"p{i}": {"title": f"P{i}", **INTEGER} for i in range(1990)}
    },
    "ranges": lambda: {"properties": {f"p{i}": {**INTEGER, "minimum": i} for i in range(1990)}},
    "links": lambda: {
        "properties": {f"p{i}": {"type": "string", "format": "uri"} for i in range(999)}
    },
    "objects": lambda: {
        "anyOf": [{"properties": {f"k{i}": INTEGER}, "required": [f"k{i}"]} for i in range(900)]
    },
    "constants": lambda: {"oneOf": [{"const": f"v{i}", "title": "V"} for i in range(4000)]},
    "names": lambda: {"properties": {f"p{i}": {} for i in range(10_000)}},
}


@pytest.mark.limits
@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_is_compiled_soon_or_refused_with_the_reason(name: str) -> None:
    schema = LARGE[name]()
    started = time.process_time()
    try:
        Constraint(VOCABULARY, form(schema), " ", 60)
    except PromptError as error:
        assert name in ("ranges", "names"), error  # noqa: PT017
        assert "too big" in str(error) or "2000 parts" in str(error)  # noqa: PT017
    else:
        assert name not in ("ranges", "names")
    assert time.process_time() - started < 5  # 2 on a quiet machine


def test_equal_parts_that_are_shared_mean_the_same() -> None:
    part = {"type": "integer", "minimum": 3, "maximum": 4}
    schema = {"properties": dict.fromkeys("abcd", part), "required": [*"abcd"]}
    assert accepts(schema, '{"a":3,"b":4,"c":3,"d":4}')
    assert not accepts(schema, '{"a":3,"b":4,"c":3,"d":5}')


# What is wrong.

WRONG: list[tuple[Any, str]] = [
    ({"type": None}, "#/type: must be null, boolean, object, array, number, integer, string, or"),
    ({"type": "strnig"}, "or a list of them, not \"strnig\""),
    ({"type": ["string", 5]}, "#/type: must be"),
    ({"enum": [1], "type": 5}, "#/type: must be"),
    ({"enum": [1], "type": "string"}, 'no value of its enum or const is of type "string"'),
    ({"const": None, "type": "array"}, "no value of its enum or const"),
    ({"enum": []}, "nothing is valid under it: the enum is empty"),
    ({"enum": "abc"}, '#/enum: must be a list of values, not "abc"'),
    ({"type": "string", "format": []}, "#/format: must be a string, not []"),
    ({"oneOf": [{"type": "null"}, {"required": 5}]}, "#/oneOf/1/required: must be a list of names"),
    ({"required": "a"}, "#/required: must be a list of names"),
    ({"items": {"multipleOf": 0}}, "#/items/multipleOf: must be a number above 0, not 0"),
    ({"minimum": "a"}, "#/minimum: must be a number"),
    ({"minimum": True}, "#/minimum: must be a number, not true"),
    ({"minLength": -1}, "#/minLength: must be a whole number from 0 on, not -1"),
    ({"maxItems": 2.5}, "#/maxItems: must be a whole number"),
    ({"pattern": 5}, "#/pattern: must be a string"),
    ({"$ref": None}, "#/$ref: must be a string, not null"),
    ({"$defs": [1]}, "#/$defs: must be an object of schemas, not [1]"),
    ({"properties": {"a/b~c": {"items": "x"}}}, "#/properties/a~1b~0c/items: must be a schema"),
    ({"additionalProperties": "no"}, "#/additionalProperties: must be a schema"),
    ({"prefixItems": 5}, "#/prefixItems: must be a list of schemas"),
    ({"anyOf": {"a": 1}}, "#/anyOf: must be a list of schemas"),
    ({"uniqueItems": 1}, "#/uniqueItems: must be true or false"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "valid under it: minimum 5 is more than max"),
    ({"type": "string", "minLength": 5, "maxLength": 4}, "minLength 5 is more than maxLength 4"),
    ({"type": "number", "minimum": 1e308, "maximum": 1e308}, "1e+308 is beyond the 15 digits"),
    ({"type": "number", "minimum": int("9" * 400)}, "is beyond the 15 digits"),
    ({"multipleOf": int("9" * 400)}, "#/multipleOf: is more than 10000"),
    ({"properties": {"a": {"not": {}}}}, '#/properties/a: Unimplemented keys: ["not"]'),
    ({"properties": {"a": {"type": "string", "format": "x"}}}, "#/properties/a: Unknown format: x"),
    ({"items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"if": {}}}}, '#/$defs/x: Unimplemented keys'),
    ({"properties": {"a": {"$ref": "#/$defs/no"}}, "required": ["a"]}, "#/properties/a: "),
    ({"const": "\ud800"}, "holds half a character"),
    ({"properties": {"\udfff": {}}}, "holds half a character"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "words"), WRONG, ids=str)
def test_a_wrong_schema_is_refused_with_where_and_why(schema: Any, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        form(schema)
    text = str(caught.value)
    assert text.startswith("schema: ")
    assert words in text
    assert len(text) < 300
    assert text.isprintable()


def test_schemas_of_the_field() -> None:
    for path in sorted(FIELD.glob("schema_*.json")):
        with pytest.raises(PromptError, match=r"^schema: #/.*: must be "):
            form(json.loads(path.read_text()))
    for name in ("schema-anchor", "schema-anchor2", "schema-pattern-maxlength"):
        schema = json.loads((FIELD / f"{name}.json").read_text())
        jsonschema.validate(json.loads(answer(form(schema), 40, 1).text), schema)


def test_what_only_looks_like_a_schema_is_no_fault() -> None:
    assert accepts({"const": {"type": 5}}, '{"type":5}')
    assert accepts({"type": "null", "x-widget": {"type": "wide", "items": "x"}}, "null")
    assert accepts({"properties": {"type": {"const": 1}, "required": {"const": 2}}}, '{"type":1}')


# Patterns and choices.


def test_a_search_for_an_ending_ends_where_a_byte_takes_milliseconds() -> None:
    """Labels of a counted length, any number of them: each byte meets new states."""
    word = "[a-z][a-z0-9]{0,30}(?:-[a-z0-9]{1,30})*"
    schema = {"type": "string", "pattern": rf"^(?:ws|wss)://{word}(?:\.{word})*$", "minLength": 1}
    found = form(schema)
    started = time.process_time()
    for seed in range(3):
        answer(found, 60, seed)
    assert time.process_time() - started < 30


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a{" + "9" * 4500 + "}", "regex: a count of 4500 digits is too large"),
        ("a{1," + "9" * 30 + "}", "a count of 30 digits"),
        ("\ud800", "regex: holds half a character"),
        (r"\ud800", "regex: "),
        (r"[^\s\S]", "regex: nothing is valid under it"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_patterns_that_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(PromptError, match=words) as caught:
        form(None, pattern)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("pattern", ["[[:alpha:]]{2}", "[a-c&&b]+", "[a||b]", "[a~~b]"])
def test_sets_that_python_would_warn_of_are_quiet(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(form(None, pattern), 20, 1).text


@pytest.mark.parametrize("text", ["\x00", "a\x1b]0;x\x07", "\x7f", "\x85", "\u2028", "\t\n\r"])
def test_control_characters_are_characters(text: str) -> None:
    assert answer(form(None, text), 30, 1).text == text
    assert json.loads(answer(form({"const": text}), 60, 1).text) == text


def test_choices_with_half_a_character_are_refused() -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        check_choices(["a", "b\udcff"])
    assert check_choices(["a\x1bb", "c\x00d"]) == ("a\x1bb", "c\x00d")
