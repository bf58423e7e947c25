"""Answers of a form: schema, choices, pattern. What is generated fits, whatever the limit."""

from __future__ import annotations

import enum
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm import DecoderError, EdgeVLM, MachineSettings, PromptError
from edge_vlm.forms.decimals import between
from edge_vlm.forms.guide import Vocabulary
from edge_vlm.forms.json_schema import schema_language
from edge_vlm.forms.languages import EMPTY, Languages
from edge_vlm.forms.regex import RegexCompiler

PICTURES = Path(__file__).parents[2] / "examples" / "images"
EXAMPLES = json.loads((PICTURES.parent / "questions.json").read_text(encoding="utf-8"))
COMMAND = shutil.which("edge-vlm", path=str(Path(sys.executable).parent)) or "edge-vlm"


class Kind(enum.Enum):
    GROCERY = "grocery"
    OTHER = "other"


class Item(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    price: float = pydantic.Field(ge=0, lt=1000)


class Receipt(pydantic.BaseModel):
    kind: Kind
    total: float
    day: date | None
    paid: bool
    items: list[Item] = pydantic.Field(max_length=3)
    note: Literal["a", 'b"\\'] | None = None


SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "minLength": 1},
        "count": {"type": "integer", "minimum": -3, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["x", "é", 1, None]}, "maxItems": 4},
    },
    "required": ["answer", "count"],
    "additionalProperties": False,
}

PATTERNS = [r"\d+\.\d\d", r"(?i)(yes|no)[.!]?", r"[^\W\d]{2,70}", r" *(\w+ ){2}[é漢].*"]


@pytest.fixture(scope="module")
def vlm() -> Iterator[EdgeVLM]:
    with EdgeVLM.load("demo", settings=MachineSettings(threads=1)) as loaded:
        yield loaded


def questions(n: int) -> list[tuple[Path, str, dict[str, Any]]]:
    """Picture, question and random settings of a call."""
    chosen = random.Random(7)
    table = [(PICTURES.parent / entry["image"], entry["question"]) for entry in EXAMPLES]
    found = []
    for picture, question in itertools.islice(itertools.cycle(table), n):
        limit = chosen.choice([60, 64, 70, 90, 200])
        warm = {"temperature": chosen.choice([0.7, 1.5, 3.0]), "seed": chosen.randrange(1000)}
        found.append((picture, question, {"max_tokens": limit, **chosen.choice([{}, warm])}))
    return found


def random_text(languages: Languages, language: int, chosen: random.Random) -> bytes:
    """Some text of a language, mostly in ASCII."""
    text, state = b"", language
    for _ in range(chosen.choice([0, 5, 40])):
        possible = np.flatnonzero(languages.row(state))
        if not len(possible) or (languages.matches_empty(state) and chosen.random() < 0.2):
            break
        plain = [b for b in possible if 32 <= b < 127]
        byte = int(chosen.choice(plain if plain and chosen.random() < 0.9 else list(possible)))
        text += bytes([byte])
        state = int(languages.row(state)[byte])
    return text + languages.shortest(state)


# The answers of a model.


def test_schema_answers_are_valid_whatever_the_limit(vlm: EdgeVLM) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for picture, question, how in questions(15):
        answer = vlm.ask(picture, question, schema=SCHEMA, **how)
        jsonschema.validate(answer.parsed, SCHEMA)
        assert answer.parsed == json.loads(answer.answer)
        assert len(answer.token_ids) <= how["max_tokens"]


def test_a_pydantic_model_gives_an_instance(vlm: EdgeVLM) -> None:
    for picture, question, how in questions(15):
        answer = vlm.ask(picture, question, schema=Receipt, **how)
        assert isinstance(answer.parsed, Receipt)
        assert answer.to_dict()["parsed"]["kind"] in ("grocery", "other")


def test_pattern_answers_match_in_full(vlm: EdgeVLM) -> None:
    for (picture, question, how), pattern in zip(
        questions(16),
        itertools.cycle(
            [r"\d+\.\d\d", r"(?i)(yes|no)[.!]?", r"[^\W\d]{2,70}", r" *(\w+ ){2}[é漢].*"]
        ),
        strict=False,
    ):
        answer = vlm.ask(picture, question, regex=pattern, **how)
        assert re.fullmatch(pattern, answer.answer), (pattern, answer.answer)


def test_choices_have_probabilities_that_sum_to_one(vlm: EdgeVLM) -> None:
    for entry, (picture, question, _) in zip(EXAMPLES[:15], questions(15), strict=True):
        choices = [entry["answer"], f"{entry['answer']}0", "nothing at all", "漢字"]
        answer = vlm.ask(picture, question, choices=choices)
        assert answer.choices is not None
        assert list(answer.choices) == choices
        assert sum(answer.choices.values()) == pytest.approx(1, abs=1e-12)
        assert answer.choices[answer.answer] == max(answer.choices.values())
        assert answer.answer == entry["answer"]  # what greedy decoding says too


def test_probabilities_are_those_of_the_model(vlm: EdgeVLM) -> None:
    """Each choice's ids and the stop computed in one run of their own, from an empty KV cache."""
    picture, question = PICTURES / "receipt-1.png", "What is the total?"
    choices = ["43.98", "43.9", "43.90", "no"]
    answer = vlm.ask(picture, question, choices=choices)
    engine = vlm.engine
    assert engine is not None
    expected = []
    for choice in choices:
        with vlm.chat() as chat:
            chat.ask(picture, question, max_tokens=1)
            conversation = chat.conversation
            context = conversation.context
            assert context is not None
            # The prompt's last position again, for its logits.
            prompt = conversation.state.ids[: answer.prompt_tokens]
            context.truncate(len(prompt) - 1)
            total = 0.0
            token = prompt[-1]
            for following in (*engine.decoder.tokenize(f" {choice}"), None):
                context.append_tokens([token], logits=True)
                logits = context.logits()[: engine.manifest.decoder.vocab_size].astype(np.float64)
                logits -= np.log(np.exp(logits).sum())
                stops = np.exp(logits[list(engine.manifest.tokens.stop)]).sum()
                total += np.log(stops) if following is None else logits[following]
                token = following if following is not None else token
            expected.append(total)
    shares = np.exp(expected) / np.exp(expected).sum()
    assert answer.choices is not None
    assert list(answer.choices.values()) == pytest.approx(list(shares), rel=1e-3)


def test_a_form_in_the_middle_of_a_chat(vlm: EdgeVLM) -> None:
    with vlm.chat(max_tokens=30) as chat:
        chat.ask(PICTURES / "receipt-1.png", "What is the total?")
        counted = chat.ask("How many items?", regex=r"\d")
        picked = chat.ask("Is it a receipt?", choices=["yes", "no"])
        last = chat.ask("Which date is printed?")
    assert re.fullmatch(r"\d", counted.answer)
    assert picked.cached_tokens >= counted.prompt_tokens
    assert last.cached_tokens >= picked.prompt_tokens


def test_the_limit_is_met_exactly_and_said(vlm: EdgeVLM) -> None:
    picture = PICTURES / "receipt-1.png"
    free = vlm.ask(picture, "Hm?", regex=r"a{30,}", max_tokens=200, temperature=1.0, seed=1)
    assert free.finish_reason in ("stop", "length")
    cut = vlm.ask(picture, "Hm?", schema={"type": "string", "minLength": 20}, max_tokens=23)
    assert len(cut.parsed) >= 20
    with pytest.raises(PromptError, match="max_tokens: 10 tokens are too few"):
        vlm.ask(picture, "Hm?", schema={"type": "string", "minLength": 500}, max_tokens=10)


def test_what_a_validator_refuses_is_an_error_and_no_turn(vlm: EdgeVLM) -> None:
    class Never(pydantic.BaseModel):
        value: int

        @pydantic.field_validator("value")
        @classmethod
        def refuse(cls, value: int) -> int:
            raise ValueError("never")

    with vlm.chat() as chat:
        with pytest.raises(DecoderError, match="Never refuses the answer"):
            chat.ask("What?", schema=Never)
        assert chat.messages == ()


# What may be asked for.


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, "'not'"),
        ({"type": "wizard"}, "schema.type"),
        ({"$ref": "https://example.org/x.json"}, "inside the schema"),
        ({"$ref": "#/$defs/none"}, "is not in the schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "nothing is valid"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "nothing is valid"),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
        ({"type": "string", "format": "rgb"}, "rgb"),
        ({"type": "string", "pattern": "(?!a)b"}, "schema.pattern: lookahead"),
        ({"type": "string", "pattern": "a", "maxLength": 4}, "together"),
        ({"type": "string", "maxLength": -1}, "maxLength"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "use anyOf"),
        ({"enum": []}, "enum"),
        ({"properties": {"a": 5}}, "schema.properties.a"),
        (["a"], "object"),
        (5, "object"),
        (object(), "schema"),
        (float("nan"), "schema"),
    ],
    ids=str,
)
def test_schemas_that_are_refused(vlm: EdgeVLM, schema: Any, words: str) -> None:
    with pytest.raises(PromptError, match=re.escape(words)) as caught:
        vlm.ask((), "What?", schema=schema)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regex": "(a)\\1"}, "backreferences"),
        ({"regex": "a("}, "not a valid"),
        ({"regex": "a\\b"}, "anchors"),
        ({"regex": "a" * 6000}, "more than"),
        ({"regex": "(" * 3000 + ")" * 3000}, "more than"),
        ({"choices": ["yes"]}, "from 2"),
        ({"choices": "yes"}, "list"),
        ({"choices": ["a", "a"]}, "twice"),
        ({"choices": ["a", " "]}, "space"),
        ({"choices": ["a", "\ud800"]}, "Unicode"),
        ({"choices": ["a", "b"], "regex": "a"}, "give one"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_forms_that_are_refused(vlm: EdgeVLM, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        vlm.ask((), "What?", **options)


def test_large_and_deep_schemas_end_quickly() -> None:
    deep: Any = {"type": "integer"}
    for _ in range(60):
        deep = {"type": "array", "items": deep}
    branching = {
        "$ref": "#/$defs/n",
        "$defs": {
            "n": {
                "type": "object",
                "properties": {name: {"$ref": f"#/$defs/{name}"} for name in "abcdefgh"},
            },
            **{name: {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]} for name in "abcdefgh"},
        },
    }
    for schema in (deep, {"enum": ["x" * 20] * 100_000}):
        with pytest.raises(PromptError, match=r"too large|too complex|larger than"):
            schema_language(Languages(), schema)
    languages = Languages()
    language = schema_language(languages, branching)  # less deep than others, but valid
    assert json.loads(languages.shortest(language)) == {}


def test_recursion_ends() -> None:
    schema = {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
                "required": ["kids"],
            }
        },
    }
    languages = Languages()
    language = schema_language(languages, schema)
    assert languages.full_match(language, b'{"kids": [{"kids": []}, {"kids": [{"kids": []}]}]}')
    assert not languages.full_match(language, b'{"kids": [{}]}')


# The languages themselves.


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"\d+", r"[A-Z]{2}-\d{3,5}", r"(?i)straße|K", r"[^\W\d]+x?", r"^a$|^b", r"(^a|b$)"),
        *(r"(a|b)*a(a|b){6}", r"é|ü+", r"(?s:.)x", r"(a*)*b", r"x{0,3000}", r"[^abc]*?x|", r"\S\s"),
    ],
)
def test_patterns_mean_what_re_means(pattern: str) -> None:
    languages = Languages()
    language = RegexCompiler(languages).compile(pattern)
    chosen = random.Random(1)
    for _ in range(40):
        text = random_text(languages, language, chosen).decode()
        assert re.fullmatch(pattern, text)
        if "(?i)" in pattern:
            continue  # only a part of what re folds is built
        at = chosen.randrange(len(text) + 1)
        changed = text[:at] + chosen.choice(["", "a", "b", "1", " ", "é", "\n"]) + text[at + 1 :]
        expected = bool(re.fullmatch(pattern, changed))
        assert languages.full_match(language, changed.encode()) == expected, changed


decimals = st.decimals(-2000, 2000, places=2).map(Fraction)


@settings(max_examples=60, deadline=None)
@given(decimals, decimals, st.booleans(), st.booleans(), decimals)
def test_numbers_are_within_their_bounds(
    one: Fraction, other: Fraction, low_open: bool, high_open: bool, value: Fraction
) -> None:
    low, high = sorted((one, other))
    languages = Languages()
    language = between(languages, low, high, low_open=low_open, high_open=high_open, n_fraction=3)
    inside = (low < value or (low == value and not low_open)) and (
        value < high or (value == high and not high_open)
    )
    text = format(float(value), ".2f").rstrip("0").rstrip(".")
    if text != "-0":
        assert languages.full_match(language, text.encode()) == inside
    if language != EMPTY:
        found = Fraction(random_text(languages, language, random.Random(0)).decode())
        assert low <= found <= high
        assert not (low_open and found == low)
        assert not (high_open and found == high)


@pytest.mark.parametrize(
    "schema",
    [
        SCHEMA,
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
        {"type": "string", "minLength": 2, "maxLength": 4},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "integer", "exclusiveMinimum": 0.5, "exclusiveMaximum": 12},
        {"oneOf": [{"type": "integer"}, {"const": "none"}]},
        *({"type": "string", "format": name} for name in ("date", "email", "ipv4", "uuid")),
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)
def test_texts_of_a_schema_are_valid_under_it(schema: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    languages = Languages()
    language = schema_language(languages, schema)
    chosen = random.Random(3)
    for _ in range(25):
        text = random_text(languages, language, chosen).decode()
        validator.validate(json.loads(text))


def test_tokens_of_parts_of_characters() -> None:
    """A character of several tokens: each is allowed where the rest can follow, and only there."""
    pieces = [bytes([byte]) for byte in range(256)] + ["é".encode(), "é!".encode(), b"\xa9!", b""]
    vocabulary = Vocabulary(pieces)
    languages = Languages()
    language = RegexCompiler(languages).compile("(é|è)!|漢")
    first = np.flatnonzero(vocabulary.after(languages, language))
    assert first.tolist() == [0xC3, "漢".encode()[0], 256, 257]
    inside = int(vocabulary.after(languages, language)[0xC3])
    assert np.flatnonzero(vocabulary.after(languages, inside)).tolist() == [0xA8, 0xA9, 258]
    assert vocabulary.spell("xé!".encode()) == [ord("x"), 257]
    with pytest.raises(DecoderError, match="every byte"):
        Vocabulary(pieces[1:])


# The command.


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(COMMAND, "ask", str(PICTURES / "receipt-1.png"), "What is the total?"),
            *("--model", "demo", "--threads", "1", *arguments),
        ],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
    )


def test_the_command_takes_forms(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    result = run("--schema", "s.json", "--max-tokens", "60", "--json", cwd=tmp_path)
    data = json.loads(result.stdout)
    assert data["parsed"] == json.loads(data["answer"])
    result = run("--choices", "43.98, 12.00,none", "--json", cwd=tmp_path)
    data = json.loads(result.stdout)
    assert data["answer"] == "43.98"
    assert list(data["choices"]) == ["43.98", "12.00", "none"]
    assert re.fullmatch(r"\d+\.\d\d\n", run("--regex", r"\d+\.\d\d", cwd=tmp_path).stdout)


def test_bad_forms_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"type": "string", "contains": 1}')
    (tmp_path / "text.json").write_text("[{]")
    for arguments, words in (
        (("--schema", "bad.json"), "'contains' is not supported"),
        (("--schema", "text.json"), "not valid JSON"),
        (("--schema", "none.json"), "no such file"),
        (("--regex", "a(?=b)"), "lookahead"),
        (("--choices", "yes"), "from 2"),
        (("--choices", "a,b", "--regex", "a"), "give one"),
    ):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stdout == ""
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
        assert len(errors) == 1
        assert words in errors[0]
