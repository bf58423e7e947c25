"""Answers that must have a form, or be one of some, from a toy model that would say anything."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pydantic
import pytest

from edge_vlm import Cancelled, CancelToken, EdgeVLM, Progress
from tests.answering.test_turns import picture, replayed
from tests.fake_engine import FakeEngine, next_scores
from tests.toy.sizes import END, TURN, VOCAB_SIZE


@pytest.fixture
def model(fake: FakeEngine) -> Iterator[EdgeVLM]:
    with fake.load() as loaded:
        yield loaded


def probability(prompt: list[int], said: list[int]) -> float:
    """That the toy model says this and stops."""
    cells = [token.to_bytes(8, "little") for token in prompt]
    found = 1.0
    for wanted in [*([token] for token in said), [END, TURN]]:
        logits = next_scores(cells)[:VOCAB_SIZE].astype(np.float64)
        shares = np.exp(logits - logits.max())
        found *= shares[wanted].sum() / shares.sum()
        cells.append(wanted[0].to_bytes(8, "little"))
    return found


def test_choices_have_the_models_probabilities(model: EdgeVLM, fake: FakeEngine) -> None:
    choices = ["yes", "yesterday", "no", "£5"]
    answer = model.ask((), "Well?", choices=choices)
    prompt = [END, *b" User: Well? Assistant:"]
    expected = {one: probability(prompt, list(f" {one}".encode())) for one in choices}
    total = sum(expected.values())
    assert answer.choices == pytest.approx({one: p / total for one, p in expected.items()})
    assert answer.answer == max(expected, key=expected.__getitem__)
    assert answer.token_ids == tuple(f" {answer.answer}".encode())
    # What they begin with is computed once: the space, "yes", "terday", "no" and the three of £5.
    assert fake.journal.n("context.append_tokens") == 1 + 1 + 3 + 6 + 2 + 3
    assert not fake.decoder.sampled


def test_choices_are_chosen_behind_what_is_cached(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue(" Hello.")
    with model.chat() as chat:
        chat.ask("Hi")
        second = chat.ask("Well?", choices=["yes", "no"])
        prompt = [END, *b" User: Hi Assistant: Hello. User: Well? Assistant:"]
        expected = [probability(prompt, list(f" {one}".encode())) for one in ("yes", "no")]
        assert second.choices is not None
        assert second.choices["yes"] == pytest.approx(expected[0] / sum(expected))
        third = chat.ask("Why?", max_tokens=8)
        assert third.token_ids == replayed(fake, chat, third)
        assert third.cached_tokens >= second.prompt_tokens


def test_choosing_can_be_stopped(model: EdgeVLM, fake: FakeEngine) -> None:
    cancel = CancelToken()

    def stop(progress: Progress) -> None:
        if progress.stage == "decode":
            cancel.set()

    with model.chat(max_tokens=8) as chat:
        with pytest.raises(Cancelled):
            chat.ask(picture(), "Well?", choices=["yes", "no"], progress=stop, cancel=cancel)
        assert chat.messages == ()
        answer = chat.ask(picture(), "Well?")
        assert answer.cached_tokens > answer.image_tokens
        assert answer.token_ids == replayed(fake, chat, answer)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_matches_its_pattern(model: EdgeVLM, temperature: float, seed: int) -> None:
    pattern = "[A-Z][a-z]{2,9}( ist)? [0-9]{1,2}"
    answer = model.ask((), "Well?", regex=pattern, temperature=temperature, seed=seed)
    assert re.fullmatch(pattern, answer.answer)


def test_what_the_model_would_say_anyway_is_said(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue(" Anna ist 42", " no pattern")
    asked = {"regex": "[A-Z][a-z]{2,9}( ist)? [0-9]{1,2}"}
    assert model.ask((), "Well?", **asked).answer == "Anna ist 42"
    assert re.fullmatch(asked["regex"], model.ask((), "Well?", **asked).answer)


class Thing(pydantic.BaseModel):
    """What is asked for."""

    name: str = pydantic.Field(max_length=8)
    n: int = pydantic.Field(ge=0, le=99)


def test_an_answer_of_a_schema_is_an_instance(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue(' {"name": "cup", "n": 3}')
    with model.chat() as chat:
        said = chat.ask(picture(), "What?", schema=Thing)
        assert isinstance(said.parsed, Thing)
        assert said.parsed == Thing.model_validate_json(said.answer)
        free = chat.ask("And?", max_tokens=8)
        assert free.token_ids == replayed(fake, chat, free)


@pytest.mark.parametrize("limit", [40, 80])
def test_any_answer_of_a_schema_is_valid(model: EdgeVLM, limit: int) -> None:
    answer = model.ask((), "What?", schema=Thing, max_tokens=limit, temperature=1.0, seed=limit)
    assert isinstance(answer.parsed, Thing)
    assert len(answer.token_ids) <= limit
