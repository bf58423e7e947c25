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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import pytest

from edge_vlm import DecoderError, EdgeVLM, MachineSettings, PromptError

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
        ({"patternProperties": {"^a": {}, "b$": {}}}, "patternProperty regexes"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, '"not"'),
        ({"type": "wizard"}, 'not "wizard"'),
        ({"$ref": "https://example.org/x.json"}, "not present in a registry"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "nothing is valid"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "nothing is valid"),
        ({"type": "number", "multipleOf": 0}, "above 0"),
        ({"type": "integer", "multipleOf": 123457}, "multipleOf"),
        ({"type": "string", "format": "rgb"}, "rgb"),
        ({"type": "string", "pattern": "(?!a)b"}, "look-ahead"),
        ({"type": "string", "pattern": "a.{20}b.{20}c", "minLength": 500}, "regex is empty"),
        ({"type": "string", "maxLength": -1}, "maxLength"),
        ({"anyOf": [{"contains": {}}]}, '"contains"'),
        ({"if": {}, "then": {}}, '"if"'),
        ({"allOf": 5}, "allOf"),
        ({"enum": []}, "nothing is valid"),
        ({"properties": {"a": 5}}, "an object of schemas"),
        (["a"], "object"),
        (5, "object"),
        pytest.param(object(), "schema", id="object"),
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
        ({"regex": "a\\b"}, "lookarounds"),
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


@pytest.mark.engine
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


@pytest.mark.engine
def test_bad_forms_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"type": "string", "contains": 1}')
    (tmp_path / "text.json").write_text("[{]")
    for arguments, words in (
        (("--schema", "bad.json"), '"contains"'),
        (("--schema", "text.json"), "not valid JSON"),
        (("--schema", "none.json"), "no such file"),
        (("--regex", "a(?=b)"), "look-ahead"),
        (("--choices", "yes"), "from 2"),
        (("--choices", "a,b", "--regex", "a"), "give one"),
    ):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stdout == ""
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
        assert len(errors) == 1
        assert words in errors[0]
