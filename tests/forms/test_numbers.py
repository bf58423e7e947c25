"""Numbers of a schema are valid under it, can be read again, and are those that were given."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm import DecoderError, PromptError
from edge_vlm.forms.ending import ends
from edge_vlm.forms.structure import Form, form_of
from edge_vlm.forms.vocabulary import byte_matcher
from tests.conftest import examples
from tests.forms.toy import answer

exact = st.builds(
    lambda digits, power: float(f"{digits}e{power}"),
    st.integers(-(10**15) + 1, 10**15 - 1),
    st.integers(-15, 0),
)
quarters = st.integers(-12, 12).map(lambda n: n / 4)


def form(schema: Any) -> Form:
    found = form_of(schema, None)
    assert found is not None
    return found


def accepts(schema: Any, text: str) -> bool:
    return ends(byte_matcher(form(schema).rule), text.encode())


@settings(max_examples=examples(50, 1000), deadline=None)
@given(quarters, quarters, st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_numbers_are_within_their_bounds(
    one: float, other: float, is_over: bool, is_under: bool, seed: int
) -> None:
    low, high = sorted((one, other))
    low_name, high_name = (
        "exclusiveMinimum" if is_over else "minimum",
        "exclusiveMaximum" if is_under else "maximum",
    )
    schema = {"type": "number", low_name: low, high_name: high + 0.25}
    jsonschema.validate(json.loads(answer(form(schema), 40, seed).text), schema)
    for text in ("0", "1", "-1", "2", "-2", "0.5", "-0.5", "0.0", "1.25", "-1.25"):
        inside = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
        assert inside or not accepts(schema, text), text


@settings(max_examples=examples(80, 2000), deadline=None)
@given(exact | st.integers(-(2**53), 2**53))
def test_constants_mean_themselves(value: float) -> None:
    assert json.loads(answer(form({"const": value}), 60, 1).text) == value


def test_numbers_that_are_not_exact_are_refused() -> None:
    for value in (2**53 + 1, 0.1 + 0.2, 123456789.12345679, 900719925474099.5, 1e-300):
        for schema in ({"const": value}, {"enum": [[value]]}, {"type": "number", "maximum": value}):
            if value > 2**53 and "type" in schema:
                continue  # no bound then
            with pytest.raises(PromptError, match="more digits than a number of 64 bits"):
                form(schema)


def test_numbers_have_an_end_and_can_be_read_again() -> None:
    for schema in ({"type": "number"}, {"type": ["null", "number"], "minimum": -(2**63)}):
        assert accepts(schema, "-12.50")
        assert accepts(schema, "999999999999999")
        for text in ("1e999", "1E5", "9" * 16, "0." + "1" * 11):
            assert not accepts(schema, text)
    with pytest.raises(DecoderError, match="1e999 is too large"):
        form({}).parse('{"a": [1e999]}')
