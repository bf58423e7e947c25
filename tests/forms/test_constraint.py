"""Answers of random logits, without a model: of their form, within their limit, what is forced."""

from __future__ import annotations

import bisect
import json
import re
import time
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic
import pytest

from edge_vlm import DecoderError, PromptError
from edge_vlm.forms.constraint import Constraint
from edge_vlm.forms.ending import ends
from edge_vlm.forms.structure import Form, form_of
from edge_vlm.forms.vocabulary import Vocabulary, byte_matcher
from tests.conftest import examples
from tests.forms.toy import PIECES, STOP, VOCABULARY, answer, spell


def form(schema: Any = None, regex: str | None = None) -> Form:
    found = form_of(schema, regex)
    assert found is not None
    return found


def shortest(found: Form) -> int:
    """The least limit, in tokens, that is not refused."""

    def fits(limit: int) -> bool:
        try:
            Constraint(VOCABULARY, found, " ", limit)
        except PromptError:
            return False
        return True

    return bisect.bisect_left(range(200), True, lo=1, key=fits)


TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["kids"],
        }
    },
}
TERM = {
    "$ref": "#/$defs/term",
    "$defs": {
        "term": {"oneOf": [{"$ref": "#/$defs/sum"}, {"$ref": "#/$defs/one"}]},
        "sum": {
            "type": "object",
            "properties": {
                "op": {"const": "add"},
                "left": {"$ref": "#/$defs/term"},
                "right": {"$ref": "#/$defs/term"},
            },
            "required": ["op", "left", "right"],
        },
        "one": {
            "type": "object",
            "properties": {"op": {"const": "num"}, "value": {"type": "integer"}},
            "required": ["op", "value"],
        },
    },
}
SCHEMAS: list[Any] = [
    True,
    {},
    {"type": ["string", "null"]},
    {"enum": ["a", 1, None, {"b": [1]}, 'q"\\\n']},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "minItems": 1},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 3},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {"type": "object", "properties": {"a": {}, "b": {"type": "null"}}, "required": ["b", "c"]},
    {"type": "string", "pattern": '^[A-Z]"\\\\?\\d{2,4}$'},
    {"type": "string", "pattern": "a|^b$"},
    {"type": "string", "pattern": "<end>$", "minLength": 9},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "integer", "exclusiveMinimum": 0.5, "exclusiveMaximum": 12},
    {"type": "integer", "minimum": 1, "multipleOf": 7},
    {"oneOf": [{"type": "integer"}, {"const": "none"}]},
    {"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "integer"}}},
    {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "minProperties": 1},
    {
        "properties": {"a": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"properties": {"b": {"const": 1}}, "required": ["b"]}],
    },
    {
        "allOf": [{"$ref": "#/$defs/x"}, {"properties": {"n": {"type": "null"}}}],
        "$defs": {"x": {"type": "object", "properties": {"m": {}}, "required": ["m", "n"]}},
    },
    TREE,
    TERM,
    *({"type": "string", "format": name} for name in ("time", "email", "ipv4", "uuid", "duration")),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_answers_of_a_schema_are_valid_under_it_whatever_the_limit(schema: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    found = form(schema)
    least = shortest(found)
    for seed in range(n := examples(4, 40)):
        limit = least + 28 * seed // (n - 1)
        said = answer(found, limit, seed, lead=" ")
        validator.validate(json.loads(said.text))
        assert said.n_tokens <= limit


# Without the classes that depend on a version of Unicode: Rust's is newer than Python's.
PATTERNS = [
    *(
        r"[0-9]+",
        r"[A-Z]{2}-[0-9]{3,5}",
        r"(?i)straße|K",
        r"[^\W\d\u0080-\U0010ffff]+x?",
        r"^a$|^b",
        r"(^a|b$)",
    ),
    *(r"(a|b)*a(a|b){6}", r"é|ü+", r"(?s:.)x", r"(a*)*b", r"x{0,3000}", r"[^abc]*?x|", r"\S\s"),
    *(
        r"[a-f]+ [a-zé]+: .*END",
        r"(?s).*</answer>",
        r"([a-zé]+ ){3}[é漢]",
        r"[^x]*x",
        "(ab)*c",
        "a?",
    ),
    *(r"a/b\/c\\/", r"\Aab\Z", "a\nb", r" *([a-zé]+ ){2}[é漢].*", r"\$\Z", r"a\\"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_match_their_pattern_whatever_the_limit(pattern: str) -> None:
    found = form(regex=pattern)
    least = shortest(found)
    for seed in range(n := examples(6, 60)):
        limit = least + 57 * seed // (n - 1)
        said = answer(found, limit, seed, lead=" ", plain=float(seed % 3))
        assert re.fullmatch(pattern, said.text), said.text
        assert said.n_tokens <= limit


# What a schema means.


def accepts(schema: Any, text: str) -> bool:
    return ends(byte_matcher(form(schema).rule), text.encode())


def test_an_object_has_the_properties_listed_and_no_others() -> None:
    plain = {"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["b", "c"]}
    assert accepts(plain, '{"a":1, "b": [true],"c":null}')
    for other in ('{"b":1,"a":1,"c":1}', '{"b":1,"c":1,"d":1}', '{"b":1}', '{ "b":1,"c":1}'):
        assert not accepts(plain, other)
    assert accepts({**plain, "additionalProperties": True}, '{"b":1,"c":1,"d":1}')


def test_objects_that_are_combined_take_each_others_properties() -> None:
    one = {"properties": {"a": {"type": "integer"}}}
    other = {"x": {"properties": {"b": {}}, "required": ["b"]}}
    for both in ({"allOf": [one, {"$ref": "#/$defs/x"}]}, {"$ref": "#/$defs/x", **one}):
        assert any(
            accepts({**both, "$defs": other}, text) for text in ('{"a":1,"b":2}', '{"b":2,"a":1}')
        )
        assert not accepts({**both, "$defs": other}, '{"a":1}')
        assert not accepts({**both, "$defs": other}, '{"a":"x","b":2}')


def test_recursion_ends() -> None:
    assert accepts(TREE, '{"kids": [{"kids": []}, {"kids": [{"kids": []}]}]}')
    assert not accepts(TREE, '{"kids": [{}]}')


# Tokens.


def first_allowed(found: Form) -> list[int]:
    masks: list[npt.NDArray[np.bool_]] = []

    def draw() -> int:
        return int(np.flatnonzero(masks[-1])[0])

    Constraint(VOCABULARY, found, "", 99).choose(lambda mask: masks.append(mask.copy()), draw)
    return [int(token) for token in np.flatnonzero(masks[0])]


def test_tokens_of_parts_of_characters() -> None:
    """A character of several tokens: each is allowed where the rest can follow, and only there."""
    whole, more = PIECES.index("é".encode()), PIECES.index("é!".encode())
    found = form(regex="(é|è)!|漢")
    first = [0xC3, "漢".encode()[0], whole, more, PIECES.index("漢".encode())]
    assert first_allowed(found) == sorted(first)
    constraint = Constraint(VOCABULARY, found, "", 9)
    constraint.choose(lambda _: None, lambda: 0xC3)
    masks: list[npt.NDArray[np.bool_]] = []
    constraint.choose(masks.append, lambda: 0xA8)
    assert np.flatnonzero(masks[0]).tolist() == [0xA8, 0xA9, PIECES.index(b"\xa9!")]


def test_stops_are_allowed_where_the_text_may_end_and_other_special_tokens_nowhere() -> None:
    assert first_allowed(form(regex="a?")) == sorted([ord("a"), *STOP])
    special = {i for i, piece in enumerate(PIECES) if not piece}
    assert set(first_allowed(form(regex="(?s).*"))) & special == set(STOP)
    assert not set(STOP) & set(first_allowed(form(regex="a")))


def test_every_byte_needs_a_token() -> None:
    with pytest.raises(DecoderError, match="every byte"):
        Vocabulary(PIECES[1:], [300], spell)


def test_a_word_that_is_a_special_token_too_is_spelled_without_it() -> None:
    """A tokenizer that reads ``<think>`` in a text as its special token does not slip it in."""
    special = len(PIECES)
    vocabulary = Vocabulary([*PIECES, b""], STOP, lambda text: [special] * text.count("<think>"))
    constraint = Constraint(vocabulary, form({"const": {"<think>": 1}}), "", 99)
    said: list[int] = []
    while not constraint.is_complete:
        said += constraint.forced() or constraint.choose(lambda _: None, lambda: ord(" "))
    assert special not in said
    assert json.loads(vocabulary.text(said)) == {"<think>": 1}


def test_what_has_no_choice_is_not_asked_of_the_model() -> None:
    class Receipt(pydantic.BaseModel):
        merchant_name: str = pydantic.Field(max_length=4)
        kind_of_receipt: Literal["grocery", "other"]
        is_paid: bool

    said = answer(form(Receipt), 200, 3)
    assert Receipt.model_validate_json(said.text)
    assert said.n_drawn < said.n_tokens / 2
    constant = answer(form({"const": {"name": [1, None, "the value"]}}), 60, 1)
    assert constant.n_drawn <= 4  # whether there is a space behind a comma or colon
    assert not constant.was_cut


def test_forced_tokens_are_those_of_the_models_tokenizer() -> None:
    constraint = Constraint(VOCABULARY, form({"const": {"name": "value"}}), " ", 60)
    said: list[int] = []
    while not constraint.is_complete:
        said += constraint.forced() or constraint.choose(lambda _: None, lambda: ord(":"))
    assert PIECES[said[0]] == b' {"'
    assert {PIECES.index(b"name"), PIECES.index(b"value")} <= set(said)


def test_an_answer_too_long_for_its_limit_is_refused_at_the_start() -> None:
    schema = {"type": "string", "minLength": 20}
    assert len(json.loads(answer(form(schema), 22, 1).text)) >= 20
    with pytest.raises(PromptError, match="max_tokens: 3 tokens are too few"):
        answer(form(schema), 3, 1)


def test_alternatives_that_fit_are_found() -> None:
    long = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(9)}}
    schema = {"anyOf": [{**long, "required": list(long["properties"])}, {"enum": ["z" * 30, None]}]}
    for seed in range(examples(8, 40)):
        assert answer(form(schema), 4, seed).text == "null"


def test_where_no_ending_is_known_the_limit_cuts() -> None:
    far = form({"type": "string", "pattern": "^[01]{40000}$"})
    said = answer(far, 20, 1)
    assert said.n_tokens == 20
    with pytest.raises(DecoderError, match="cannot be read as JSON"):
        far.parse(said.text)


# What is hostile.


def nested(n: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


def chained(n: int, link: Any) -> Any:
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{n}": {"type": "integer"}}}


HOSTILE: dict[str, Any] = {
    "deep": nested(40),
    "deeper": nested(400),
    "same words": {"enum": ["x" * 20] * 40_000},
    "many words": {"enum": [f"x{i}" for i in range(100_000)]},
    "many lists": {"enum": [[i] for i in range(100_000)]},
    "many names": {"type": "object", "properties": {f"p{i}": {} for i in range(1900)}},
    "too many names": {"type": "object", "properties": {f"p{i}": {} for i in range(30_000)}},
    "too large": {"enum": ["x" * (1 << 20)]},
    "long lists": {"type": "array", "items": {"type": "object"}, "minItems": 50_000},
    "long texts": {"type": "string", "pattern": "^(ab|c)*$", "minLength": 99_999},
    "counts": {"type": "string", "maxLength": 10**18},
    "states": {"type": "string", "pattern": "(a|b)*a(a|b){25}(c|d){25}"},
    "all patterns": {"allOf": [{"type": "string", "pattern": f"[a-z]{{{i}}}x"} for i in range(60)]},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967, 9949)]},
    "products": {"allOf": [{"anyOf": [{"minLength": i + j} for j in range(5)]} for i in range(12)]},
    "doubling": chained(25, lambda inner: {"allOf": [inner, inner]}),
    "doubling one": chained(25, lambda inner: {"oneOf": [inner, {"type": "null"}]}),
    "doubling pairs": chained(25, lambda inner: {"items": inner, "minItems": 2}),
    "itself": {"$ref": "#"},
    "all of itself": {"allOf": [{"$ref": "#"}]},
    "circle": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}},
    },
    "branching": {
        "$ref": "#/$defs/n",
        "$defs": {
            "n": {
                "type": "object",
                "properties": {c: {"$ref": f"#/$defs/{c}"} for c in "abcdefgh"},
            },
            **{c: {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]} for c in "abcdefgh"},
        },
    },
}
HOSTILE_PATTERNS = [
    *("(a{1000}){1000}", "a{1000}{1000}", "a{100000000}", "(a?){5000}a{5000}", r"\w" * 1000),
    *("(" * 150 + ")" * 150, "(" * 1500 + ")" * 1500, "(" * 6 + "a" + "{1,1000})" * 6),
    *("(((((a+)+)+)+)+)+b", "(a|b)*a(a|b){200}c", "(.*x.{20}){5}", r"(\w{1,1000} ){1,1000}x"),
    *("((([ab]{0,50}c){0,50}d){0,50}e)", "|".join(f"w{i}" for i in range(700)), r"[^\s\S]"),
    "(?:" + "|".join(f"(?:a{{{n}}})*" for n in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)) + ")b",
]


@pytest.mark.limits
@pytest.mark.parametrize(
    ("schema", "regex"),
    [*((schema, None) for schema in HOSTILE.values()), *((None, p) for p in HOSTILE_PATTERNS)],
    ids=[*HOSTILE, *(pattern[:30] for pattern in HOSTILE_PATTERNS)],
)
def test_what_is_hostile_ends_within_seconds(schema: Any, regex: str | None) -> None:
    started = time.process_time()
    try:
        assert answer(form(schema, regex), 100, 1)
    except PromptError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 300  # noqa: PT017
    assert time.process_time() - started < 10
