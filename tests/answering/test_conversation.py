"""Conversations of a toy model: taking back, asking again, dropping, beginning anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge_vlm import BudgetError, EdgeVLM, ImageError, PromptError
from edge_vlm.prompt.messages import ImagePart
from tests.answering.test_turns import picture, replayed
from tests.fake_engine import FakeEngine

PER_POSITION = 64  # bytes of the toy's KV cache
ROOM = 512  # positions that a small budget holds


@pytest.fixture
def model(fake: FakeEngine) -> Iterator[EdgeVLM]:
    with fake.load() as loaded:
        yield loaded


def texts(chat: object) -> list[str]:
    return [message.text for message in chat.messages]  # type: ignore[attr-defined]


def test_the_last_turn_is_taken_back(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue(" One.", " Two.", " Three.")
    with model.chat() as chat:
        first = chat.ask("A?")
        chat.ask(picture(), "B?")
        question, answer = chat.undo()
        assert (question.text, answer.text) == ("B?", "Two.")
        assert isinstance(question.parts[0], ImagePart)
        assert texts(chat) == ["A?", "One."]
        third = chat.ask("C?")
        assert third.images == ()
        assert third.cached_tokens >= first.prompt_tokens
        chat.undo()
        chat.undo()
        assert chat.undo() == ()
        assert chat.messages == ()
        fourth = chat.ask("D?", max_tokens=8)
        assert fourth.token_ids == replayed(fake, chat, fourth)


def test_asking_again_replaces_the_answer_when_that_is_done(
    model: EdgeVLM, fake: FakeEngine
) -> None:
    fake.enqueue(" One.", " Two.", " Three.")
    with model.chat() as chat:
        with pytest.raises(PromptError, match="no question"):
            chat.retry()
        chat.ask("A?")
        second = chat.ask(picture(), "B?")
        with chat.retry(temperature=1.0, seed=1) as stream:
            next(stream)
            assert texts(chat) == ["A?", "One.", "B?", "Two."]
            list(stream)
        assert texts(chat) == ["A?", "One.", "B?", "Three."]
        assert stream.answer.cached_tokens == second.prompt_tokens - 1  # all but the last
        assert stream.answer.encoded_crops == stream.answer.cached_crops == 0
        chat.undo()
        assert texts(chat) == ["A?", "One."]  # not the second answer


def test_asking_again_after_beginning_with_what_was_had_elsewhere(
    model: EdgeVLM, fake: FakeEngine
) -> None:
    told = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "One."}]
    fake.enqueue(" Two.")
    with model.chat() as chat:
        chat.restart(told)
        assert texts(chat) == ["A?", "One."]
        chat.retry().result()
        assert texts(chat) == ["A?", "Two."]
        assert [message.role for message in chat.undo()] == ["user", "assistant"]
        with pytest.raises(PromptError):
            chat.restart([{"role": "robot", "content": "A?"}])


def test_beginning_anew_uses_what_fits(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue(" One.")
    with model.chat(max_tokens=8) as chat:
        first = chat.ask(picture(), "A?")
        chat.restart()
        assert chat.messages == ()
        again = chat.ask(picture(), "B?")
        assert again.cached_tokens > again.image_tokens
        assert again.prompt_tokens == first.prompt_tokens
        assert again.token_ids == replayed(fake, chat, again)
        with pytest.raises(ImageError):
            chat.restart(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "gone.png"}}],
                    },
                    {"role": "assistant", "content": "Gone."},
                ]
            )
        assert texts(chat)[0] == "B?"  # nothing changed


def test_the_oldest_questions_are_dropped_and_pictures_stay(
    model: EdgeVLM, fake: FakeEngine
) -> None:
    fake.enqueue(" One.", " Two.", " Three.")
    with model.chat(max_tokens=8) as chat:
        chat.ask(picture(), "A?")
        chat.ask("B?")
        chat.ask("C?")
        assert chat.drop_oldest(2) == []
        assert texts(chat) == ["C?", "Three."]
        assert isinstance(chat.messages[0].parts[0], ImagePart)
        answer = chat.ask("D?")
        assert answer.image_tokens == 44
        assert answer.encoded_crops == 0
        assert answer.token_ids == replayed(fake, chat, answer)
        (left,) = chat.drop_oldest(2)
        assert chat.messages == ()
        assert left is not None


def test_how_many_to_drop(fake: FakeEngine) -> None:
    with fake.load(kv_budget=ROOM * PER_POSITION) as model, model.chat(max_tokens=16) as chat:
        n_asked = 0
        while chat.n_to_drop((), "What about this one?") == 0:
            fake.enqueue(" An answer.")
            chat.ask("What about this one?")
            n_asked += 1
        assert 3 < n_asked < 20
        n_dropped = chat.n_to_drop((), "What about this one?")
        assert n_dropped is not None
        assert 0 < n_dropped < n_asked
        chat.drop_oldest(n_dropped)
        answer = chat.ask("What about this one?")
        assert answer.prompt_tokens <= ROOM * 3 // 4
        assert answer.token_ids == replayed(fake, chat, answer)
        assert chat.n_to_drop((), "x" * 5000) is None


def test_a_request_over_the_budget_says_what_fits(fake: FakeEngine) -> None:
    large = picture(0, 60, 80)
    with fake.load(kv_budget=256 * PER_POSITION) as model, model.chat() as chat:
        question = "?" * 170
        with pytest.raises(BudgetError, match="holds 256") as caught:
            chat.ask(large, question)
        tiles = int(str(caught.value).split("--max-tiles ")[1].split(")")[0])
        assert 1 <= tiles < 6
        with pytest.raises(BudgetError):
            chat.ask(large, question, max_tiles=tiles + 1)
        assert not fake.decoder.contexts  # nothing was computed
        assert chat.messages == ()
        answer = chat.ask(large, question, max_tiles=tiles)
        assert answer.prompt_tokens + len(answer.token_ids) <= 256
        assert answer.kv_bytes == 256 * PER_POSITION


def test_the_budget_ends_a_long_answer(fake: FakeEngine) -> None:
    fake.enqueue("word " * 100)
    with fake.load(kv_budget=256 * PER_POSITION) as model:
        answer = model.ask((), "Go on.", max_tokens=4000)
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + len(answer.token_ids) == 256
    assert answer.kv_bytes == 256 * PER_POSITION


def test_choices_that_do_not_fit(fake: FakeEngine) -> None:
    with fake.load(kv_budget=256 * PER_POSITION) as model:
        with pytest.raises(BudgetError, match="the choices do not fit"):
            model.ask((), "?" * 180, choices=["a", "b" * 60])
        assert model.ask((), "?" * 180, choices=["a", "b" * 20]).choices


def test_fewer_tiles_for_every_picture(fake: FakeEngine) -> None:
    with fake.load(max_tiles=2) as model:
        both = model.ask([picture(1), picture(2)], "What?", max_tokens=1)
        assert [used.crops for used in both.images] == [3, 3]
        assert model.ask(picture(1), "What?", max_tokens=1, max_tiles=1).images[0].crops == 2
        assert model.encode(picture(1), max_tiles=6).use.crops == 3
