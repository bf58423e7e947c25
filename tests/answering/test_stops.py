"""A turn that is stopped, fails or is not read to its end is taken back, and the next one is right.

Work is stopped between two pieces and inside one: where a journal's ``during`` is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_vlm import (
    Cancelled,
    CancelToken,
    Chat,
    DecoderError,
    EdgeVLM,
    EdgeVLMError,
    Progress,
    VisionError,
)
from tests.answering.test_turns import picture, replayed
from tests.fake_engine import FakeEngine


@pytest.fixture
def model(fake: FakeEngine) -> Iterator[EdgeVLM]:
    with fake.load() as loaded:
        yield loaded


@pytest.fixture
def chat(model: EdgeVLM) -> Iterator[Chat]:
    with model.chat(max_tokens=12) as opened:
        yield opened


def goes_on(fake: FakeEngine, chat: Chat, n_messages: int) -> None:
    """Nothing is left of what was stopped."""
    assert len(chat.messages) == n_messages
    answer = chat.ask(picture(), "And now?")
    assert answer.token_ids == replayed(fake, chat, answer)
    follow_up = chat.ask("Sure?")
    assert follow_up.token_ids == replayed(fake, chat, follow_up)
    assert follow_up.cached_tokens >= answer.prompt_tokens


def test_what_a_stopped_turn_cut_off_counts_as_cached_no_longer(
    fake: FakeEngine, chat: Chat
) -> None:
    """It forgets the last turn's positions before it is stopped, and the same are asked for."""
    first = chat.ask([picture(1), picture(2)], "What?")
    chat.undo()
    cancel = CancelToken()
    with pytest.raises(Cancelled):
        chat.ask(picture(3), "And?", progress=stopping(cancel, "vision", 1), cancel=cancel)
    again = chat.ask([picture(1), picture(2)], "What?")
    assert again.cached_tokens < 10
    assert again.token_ids == first.token_ids


def stopping(cancel: CancelToken, stage: str, done: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.stage == stage and progress.done >= done:
            cancel.set()

    return stop


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("stage", "done"),
    [
        *(("vision", 0), ("vision", 3), ("vision", 7)),
        *(("prefill", 0), ("prefill", 40), ("prefill", 60)),
        *(("decode", 1), ("decode", 5)),
    ],
)
def test_stopping_between_two_pieces(
    fake: FakeEngine, chat: Chat, stage: str, done: int, before: bool
) -> None:
    if before:
        chat.ask("Hello")
    cancel = CancelToken()
    with pytest.raises(Cancelled):
        chat.ask(picture(), "What?", progress=stopping(cancel, stage, done), cancel=cancel)
    goes_on(fake, chat, 2 if before else 0)


@pytest.mark.parametrize("engine", ["vision", "decoder"])
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_stopping_inside_a_piece(fake: FakeEngine, chat: Chat, engine: str, nth: int) -> None:
    cancel = CancelToken()
    calls: list[str] = []

    def work(of: str) -> None:
        calls.extend([of] if of == engine else [])
        if calls == [engine] * nth:
            cancel.set()

    fake.journal.during = work
    with pytest.raises(Cancelled, match="while"):
        chat.ask(picture(), "What?", cancel=cancel)
    fake.journal.during = lambda _: None
    goes_on(fake, chat, 0)


def test_a_token_that_was_set_before_touches_no_engine(fake: FakeEngine, chat: Chat) -> None:
    cancel = CancelToken()
    cancel.set()
    with pytest.raises(Cancelled):
        chat.ask(picture(), "What?", cancel=cancel)
    assert fake.journal.n("vision.encode") == fake.journal.n("context.append_tokens") == 0
    goes_on(fake, chat, 0)


def test_what_was_computed_before_a_stop_is_used(fake: FakeEngine, chat: Chat) -> None:
    first = chat.ask(picture(), "What?")
    cancel = CancelToken()
    with pytest.raises(Cancelled):
        chat.ask(picture(2), "And?", progress=stopping(cancel, "prefill", 1), cancel=cancel)
    again = chat.ask(picture(2), "And?")
    assert (again.encoded_crops, again.cached_crops) == (0, 7)
    assert again.cached_tokens >= first.prompt_tokens


@pytest.mark.parametrize("done", [1, 4])
def test_a_part_of_an_answer_may_be_kept(fake: FakeEngine, chat: Chat, done: int) -> None:
    fake.enqueue(" a long answer")
    cancel = CancelToken()
    stop = stopping(cancel, "decode", done)
    stream = chat.stream("What?", progress=stop, cancel=cancel, keep_partial=True)
    answer = stream.result()
    assert answer.finish_reason == "cancelled"
    assert answer.token_ids == tuple(b" a long answer"[:done])
    assert [message.text for message in chat.messages] == ["What?", answer.answer]
    follow_up = chat.ask("Go on.")
    assert follow_up.token_ids == replayed(fake, chat, follow_up)
    retried = chat.retry(cancel=stop_at_once(), keep_partial=True)
    with pytest.raises(Cancelled):  # nothing was said that could be kept
        retried.result()
    assert len(chat.messages) == 4


def stop_at_once() -> CancelToken:
    cancel = CancelToken()
    cancel.set()
    return cancel


def test_a_form_is_never_kept_in_part(fake: FakeEngine, chat: Chat) -> None:
    cancel = CancelToken()
    stop = stopping(cancel, "decode", 2)
    stream = chat.stream("What?", progress=stop, cancel=cancel, keep_partial=True, regex="[a-z]{9}")
    with pytest.raises(Cancelled):
        stream.result()
    goes_on(fake, chat, 0)


@pytest.mark.parametrize("n_read", [0, 1, 3])
def test_a_stream_that_is_closed_is_taken_back(fake: FakeEngine, chat: Chat, n_read: int) -> None:
    with chat.stream(picture(), "What?") as stream:
        for _ in range(n_read):
            next(stream)
    with pytest.raises(DecoderError, match="not complete"):
        _ = stream.answer
    with pytest.raises(DecoderError, match="the stream was closed"):
        list(stream)
    goes_on(fake, chat, 0)


def test_one_turn_at_a_time(fake: FakeEngine, chat: Chat) -> None:
    fake.enqueue("one two three")
    stream = chat.stream("What?")
    next(stream)
    with pytest.raises(DecoderError, match="already answering"):
        chat.ask("And?")
    assert stream.result().answer == "one two thre"  # the other turn changed nothing
    assert len(chat.messages) == 2


def test_a_stream_frees_what_it_used(model: EdgeVLM, fake: FakeEngine) -> None:
    with model.stream(picture(), "What?", max_tokens=8) as stream:
        next(stream)
        assert fake.decoder.contexts[0].is_open
    assert not fake.decoder.contexts[0].is_open
    with contextlib.suppress(Cancelled):
        model.ask(picture(), "What?", cancel=stop_at_once())
    assert not any(context.is_open for context in fake.decoder.contexts)


FAILURES = [
    ("decoder.context", DecoderError("no memory")),
    ("context.truncate", DecoderError("no memory")),
    ("vision.load", VisionError("no memory")),
    ("vision.encode", VisionError("no memory")),
    ("context.append_tokens", DecoderError("no memory")),
    ("context.append_embeddings", DecoderError("no memory")),
]


@pytest.mark.parametrize(("call", "error"), FAILURES, ids=[call for call, _ in FAILURES])
def test_an_engine_that_fails(fake: FakeEngine, chat: Chat, call: str, error: EdgeVLMError) -> None:
    fake.fail(call, error)
    with pytest.raises(type(error), match="no memory"):
        chat.ask(picture(), "What?")
    goes_on(fake, chat, 0)


@pytest.mark.parametrize(("call", "error"), FAILURES[1:], ids=[call for call, _ in FAILURES[1:]])
def test_an_engine_that_fails_later(
    fake: FakeEngine, chat: Chat, call: str, error: EdgeVLMError
) -> None:
    chat.ask("Hello")
    fake.fail(call, error)
    with pytest.raises(type(error), match="no memory"):
        chat.ask(picture(), "What?")
    goes_on(fake, chat, 2)


def test_a_larger_context_that_cannot_be_made(fake: FakeEngine, chat: Chat) -> None:
    chat.ask("Hello")
    fake.fail("context.reserve", DecoderError("no memory"))
    with pytest.raises(DecoderError, match="no memory"):
        chat.ask("Tell me more." * 20)
    goes_on(fake, chat, 2)


def test_a_decoder_that_fails_in_the_middle_of_an_answer(fake: FakeEngine, chat: Chat) -> None:
    fake.enqueue("a long answer")
    stream = chat.stream("What?")
    assert next(stream) == "a"
    fake.fail("context.append_tokens", DecoderError("code -3"))
    with pytest.raises(DecoderError, match="code -3"):
        list(stream)
    goes_on(fake, chat, 0)


def test_an_error_in_what_watches_is_the_callers(fake: FakeEngine, chat: Chat) -> None:
    def broken(progress: Progress) -> None:
        raise ZeroDivisionError(progress.stage)

    with pytest.raises(ZeroDivisionError, match="vision"):
        chat.ask(picture(), "What?", progress=broken)
    goes_on(fake, chat, 0)


def test_an_answer_that_was_stopped_keeps_its_picture_on_disk(
    fake: FakeEngine, tmp_path: Path
) -> None:
    for number, (stage, done) in enumerate([("prefill", 66), ("decode", 2)]):
        cache = tmp_path / f"cache-{number}"
        cancel = CancelToken()
        stop = stopping(cancel, stage, done)
        with fake.load(cache=cache) as model, pytest.raises(Cancelled):
            model.ask(picture(), "What?", progress=stop, cancel=cancel)
        with fake.load(cache=cache) as model:
            assert model.ask(picture(), "And?", max_tokens=1).restored_tokens > 44
