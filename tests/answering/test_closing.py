"""What is closed while it works, and what is used afterwards: an error, never an answer of nothing.

Work waits inside an engine while another thread closes; nothing may be freed under it.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from edge_vlm import AsyncEdgeVLM, Cancelled, CancelToken, Chat, DecoderError, EdgeVLM, Progress
from edge_vlm.progress import Life
from tests.answering.test_turns import picture
from tests.fake_engine import FakeEngine


class Stage:
    """A thread at work in an engine, which goes on when the block ends."""

    def __init__(self, fake: FakeEngine, engine: str) -> None:
        self._fake, self._engine = fake, engine
        self._is_there, self._may_go = threading.Event(), threading.Event()
        self.was_freed = False

    def begin(self, pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Future[Any]:
        """Start it and wait until it is there."""
        self.expect()
        future = pool.submit(work)
        assert self._is_there.wait(10)
        return future

    def expect(self) -> threading.Event:
        """Set when something is there."""
        self._fake.journal.during = self._during
        return self._is_there

    def go_on(self) -> None:
        """Let it see what became of its engine."""
        self._may_go.set()

    def _during(self, engine: str) -> None:
        if engine == self._engine and not self._is_there.is_set():
            self._is_there.set()
            assert self._may_go.wait(10)
            opened = [context.is_open for context in self._fake.decoder.contexts]
            self.was_freed = self._fake.decoder.is_closed or not all(opened)


@pytest.fixture
def model(fake: FakeEngine) -> Iterator[EdgeVLM]:
    with fake.load() as loaded:
        yield loaded


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as one:
        yield one


def use(model: EdgeVLM, chat: Chat) -> dict[str, tuple[Callable[[], Any], Callable[[], None]]]:
    """What works for long, and what closes it."""
    stream = chat.stream(picture(), "What?")
    return {
        "ask": (lambda: model.ask(picture(), "What?"), model.close),
        "encode": (lambda: model.encode(picture()), model.close),
        "chat, its model": (lambda: chat.ask(picture(), "What?"), model.close),
        "chat": (lambda: chat.ask(picture(), "What?"), chat.close),
        "stream": (lambda: list(stream), stream.close),
        "stream, its chat": (lambda: list(stream), chat.close),
        "stream, its model": (lambda: "".join(stream), model.close),
        "retry": (lambda: chat.retry().result(), chat.close),
    }


NAMES = ("ask", "chat, its model", "chat", "stream", "stream, its chat", "stream, its model")


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("encode", "vision"),
        ("retry", "decoder"),  # its picture is encoded
        *((name, engine) for name in NAMES for engine in ("vision", "decoder")),
    ],
)
def test_closing_stops_what_works_and_frees_nothing_under_it(
    fake: FakeEngine, model: EdgeVLM, pool: ThreadPoolExecutor, name: str, engine: str
) -> None:
    chat, stage = model.chat(max_tokens=50), Stage(fake, engine)
    if name == "retry":
        chat.ask(picture(), "What?", max_tokens=1)
    work, close = use(model, chat)[name]
    future = stage.begin(pool, work)
    close()
    n_calls = len(fake.journal.calls)
    stage.go_on()
    with pytest.raises(DecoderError, match=r"the (model|chat|stream) was closed"):
        future.result(10)
    assert not stage.was_freed
    assert len(fake.journal.calls) <= n_calls + 2  # rest and release
    if close == model.close:
        assert fake.decoder.is_closed
    if close != model.close and "stream" not in name:
        assert not any(context.is_open for context in fake.decoder.contexts)
    if close.__self__ is not chat and close != model.close:
        assert chat.ask("And?", max_tokens=2).token_ids  # the chat is as before
    chat.close()


def test_every_use_after_closing_is_an_error(fake: FakeEngine, model: EdgeVLM) -> None:
    fake.enqueue("one two", "one", "one")
    chat, begun, read = model.chat(), model.stream((), "What?"), model.stream((), "What?")
    chat.ask("What?")
    waiting, encoded = model.stream((), "What?"), model.encode(picture())
    next(begun)
    assert read.result().answer == "one"
    model.close()
    model.close()
    uses: list[Callable[[], Any]] = [
        lambda: model.ask((), "What?"),
        lambda: model.ask(encoded, "What?"),
        lambda: model.stream((), "What?"),
        lambda: model.encode(picture()),
        model.chat,
        lambda: chat.ask("And?"),
        lambda: chat.ask(encoded, "And?"),
        lambda: chat.stream("And?"),
        lambda: chat.retry(),
        chat.undo,
        chat.restart,
        lambda: chat.restart([{"role": "user", "content": "Hello"}]),
        lambda: chat.drop_oldest(1),
        lambda: chat.n_to_drop((), "What?"),
        lambda: chat.messages,
        lambda: next(begun),
        lambda: "".join(begun),
        lambda: begun.result(),
        lambda: "".join(waiting),
    ]
    for number, one in enumerate(uses):
        with pytest.raises(DecoderError, match="the model was closed"):
            pytest.fail(f"use {number} gave {one()!r}")
    assert list(read) == []  # it was read to its end
    assert read.answer.answer == "one"
    assert not any(context.is_open for context in fake.decoder.contexts)
    for closed in (begun, waiting, read, chat, model):
        closed.close()


def test_a_closed_chat_stays_closed(fake: FakeEngine, model: EdgeVLM) -> None:
    chat = model.chat(max_tokens=4)
    chat.ask("What?")
    chat.close()
    chat.close()
    assert not fake.decoder.contexts[0].is_open
    for one in (lambda: chat.ask("And?"), chat.restart, chat.undo, lambda: chat.messages):
        with pytest.raises(DecoderError, match="the chat was closed"):
            one()
    assert model.ask((), "What?", max_tokens=2).token_ids


@pytest.mark.parametrize("stage", ["vision", "prefill", "decode"])
@pytest.mark.parametrize("what", ["model", "chat", "stream"])
def test_what_watches_may_close(fake: FakeEngine, model: EdgeVLM, what: str, stage: str) -> None:
    """In the thread that works, and inside the call."""
    chat = model.chat(max_tokens=8)

    def close(event: Progress) -> None:
        if event.stage == stage:
            {"model": model, "chat": chat, "stream": stream}[what].close()

    stream = chat.stream(picture(), "What?", progress=close)
    with pytest.raises(DecoderError, match=f"the {what} was closed"):
        stream.result()
    if what != "stream":
        assert not any(context.is_open for context in fake.decoder.contexts)


def test_a_token_of_the_callers_is_still_cancelled(fake: FakeEngine, model: EdgeVLM) -> None:
    cancel = CancelToken()
    with pytest.raises(Cancelled):
        model.ask(picture(), "What?", progress=lambda _: cancel.set(), cancel=cancel)
    with pytest.raises(Cancelled):
        model.encode(picture(), cancel=cancel)
    assert cancel._listeners == []


def test_an_answer_kept_in_part_is_not_kept_when_closed(
    fake: FakeEngine, model: EdgeVLM, pool: ThreadPoolExecutor
) -> None:
    fake.enqueue("a long answer")
    chat, stage = model.chat(), Stage(fake, "decoder")
    stream = chat.stream("What?", keep_partial=True)
    next(stream)
    future = stage.begin(pool, stream.result)
    chat.close()
    stage.go_on()
    with pytest.raises(DecoderError, match="the chat was closed"):
        future.result(10)


def test_a_chat_does_one_thing_at_a_time(
    fake: FakeEngine, model: EdgeVLM, pool: ThreadPoolExecutor
) -> None:
    chat, stage = model.chat(max_tokens=4), Stage(fake, "decoder")
    chat.ask("What?")
    stream = chat.stream("And?")
    future = stage.begin(pool, stream.result)
    busy: list[Callable[[], Any]] = [
        chat.undo,
        chat.restart,
        lambda: chat.retry(),
        lambda: chat.drop_oldest(1),
        lambda: chat.n_to_drop((), "Hm?"),
        lambda: chat.ask("Hm?"),
    ]
    for one in busy:
        with pytest.raises(DecoderError, match="already answering"):
            one()
    with pytest.raises(DecoderError, match="another thread"):
        next(stream)
    fake.journal.during = lambda _: None
    stage.go_on()
    with pytest.raises(DecoderError, match="the stream was closed"):  # next() has closed it
        future.result(10)
    assert len(chat.messages) == 2
    assert len(chat.undo()) == 2


def test_a_stream_that_is_forgotten_is_over(fake: FakeEngine, model: EdgeVLM) -> None:
    chat = model.chat(max_tokens=8)
    gc.disable()  # without a collector's help
    try:
        stream = chat.stream(picture(), "What?")
        next(stream)
        del stream
        assert chat.ask("What?").token_ids
    finally:
        gc.enable()


def test_parts_go_before_the_whole() -> None:
    freed: list[str] = []
    whole = Life("the whole", lambda: freed.append("whole"))
    part = Life("the part", lambda: freed.append("part"), whole)
    other = Life("the other part", lambda: freed.append("other"), whole)
    with ExitStack() as outside, ExitStack() as inside:
        outside.enter_context(other.call())
        inside.enter_context(part.call())
        inside.enter_context(part.call())
        whole.close()
        assert freed == []
        assert part.cancel.is_set
        for call, gone in (
            (part.check, []),
            (inside.close, ["part"]),
            (outside.close, ["part", "other", "whole"]),
        ):
            with pytest.raises(DecoderError, match="the whole was closed"):
                call()
            assert freed == gone
    assert freed == ["part", "other", "whole"]
    whole.close()
    part.close()
    assert freed == ["part", "other", "whole"]
    with pytest.raises(DecoderError, match="the whole was closed"):
        Life("another part", part_of=whole)


def test_two_threads_may_close_at_once() -> None:
    """The whole is not freed while a part is being."""
    freed: list[str] = []
    begun, may_go = threading.Event(), threading.Event()

    def slowly() -> None:
        begun.set()
        assert may_go.wait(10)
        freed.append("part")

    whole = Life("the whole", lambda: freed.append("whole"))
    part = Life("the part", slowly, whole)
    thread = threading.Thread(target=part.close)
    thread.start()
    assert begun.wait(10)
    whole.close()
    assert freed == []
    may_go.set()
    thread.join()
    assert freed == ["part", "whole"]


# asyncio


def test_the_asyncio_front_is_closed_alike(fake: FakeEngine) -> None:
    async def main() -> None:
        fake.enqueue("a long answer", "one")
        model = AsyncEdgeVLM(fake.load())
        chat, read = model.chat(), model.stream((), "What?")
        stream = model.stream((), "What?")
        assert await stream.__anext__() == "a"
        await stream.aclose()
        with pytest.raises(DecoderError, match="the stream was closed"):
            await stream.__anext__()
        with pytest.raises(DecoderError, match="the stream was closed"):
            await stream.result()
        assert (await read.result()).answer == "one"
        assert [piece async for piece in read] == []
        await chat.aclose()
        with pytest.raises(DecoderError, match="the chat was closed"):
            await chat.ask("What?")
        waiting = model.stream((), "What?")
        await model.aclose()
        for refused in (waiting.result(), model.ask((), "What?"), model.encode(picture())):
            with pytest.raises(DecoderError, match="the model was closed"):
                await refused

    asyncio.run(main())


@pytest.mark.parametrize("what", ["model", "chat", "stream"])
def test_closing_stops_tasks(fake: FakeEngine, what: str) -> None:
    async def main() -> None:
        model, stage = AsyncEdgeVLM(fake.load()), Stage(fake, "decoder")
        chat = model.chat(max_tokens=50)
        stream = chat.stream(picture(), "What?")
        is_there = stage.expect()
        reading = asyncio.create_task(stream.result())
        assert await asyncio.to_thread(is_there.wait, 10)
        closing = asyncio.create_task(
            {"model": model, "chat": chat, "stream": stream}[what].aclose()  # type: ignore[attr-defined]
        )
        await asyncio.sleep(0.02)
        stage.go_on()
        with pytest.raises(DecoderError, match=f"the {what} was closed"):
            await reading
        await closing
        await model.aclose()
        assert not stage.was_freed
        assert not any(context.is_open for context in fake.decoder.contexts)

    asyncio.run(main())
