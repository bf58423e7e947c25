"""The asyncio front with a toy model: what a cancelled task leaves, and who is told what."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from edge_vlm import (
    AsyncEdgeVLM,
    Cancelled,
    CancelToken,
    DecoderError,
    MachineSettings,
    Progress,
    PromptError,
)
from tests.answering.test_turns import picture, replayed
from tests.fake_engine import FakeEngine

Main = Callable[[AsyncEdgeVLM], Coroutine[Any, Any, None]]


def run(fake: FakeEngine, main: Main) -> None:
    """With a model that is loaded and closed in the loop."""

    async def whole() -> None:
        settings = MachineSettings(cache=None, threads=1)
        loaded = await AsyncEdgeVLM.load(
            fake.bundle, settings=settings, vision=fake.vision, decoder=fake.decoder
        )
        async with loaded as model:
            await main(model)

    asyncio.run(whole())
    assert fake.decoder.is_closed
    ends = time.monotonic() + 5
    while any(thread.name.startswith("edge-vlm answer") for thread in threading.enumerate()):
        assert time.monotonic() < ends


def test_answers_streams_and_chats(fake: FakeEngine) -> None:
    async def main(model: AsyncEdgeVLM) -> None:
        fake.enqueue("Noise.", "Grey.", " One.", " Two.")
        assert str(await model.ask(picture(), "What?")) == "Noise."
        async with model.stream(await model.encode(picture()), "Which colour?") as stream:
            with pytest.raises(DecoderError, match="not complete"):
                _ = stream.answer
            assert [piece async for piece in stream] == [*"Grey."]
        assert stream.answer.encoded_crops == 0
        async with model.chat() as chat:
            first = await chat.ask("A?")
            second = await chat.ask("B?")
            assert second.cached_tokens > first.prompt_tokens
            assert [message.text for message in chat.chat.messages] == ["A?", "One.", "B?", "Two."]

    run(fake, main)


def test_progress_is_told_in_the_loop(fake: FakeEngine) -> None:
    seen: list[Progress] = []

    def look(event: Progress) -> None:
        assert asyncio.get_running_loop()
        seen.append(event)

    async def main(model: AsyncEdgeVLM) -> None:
        await model.ask(picture(), "What?", max_tokens=3, progress=look)

    run(fake, main)
    assert [event.done for event in seen if event.stage == "vision"] == list(range(8))
    assert [event.done for event in seen if event.stage == "decode"] == [1, 2, 3]


def test_questions_are_answered_side_by_side(fake: FakeEngine) -> None:
    both = threading.Barrier(2, timeout=10)
    met: list[str] = []

    def work(engine: str) -> None:
        if engine == "decoder" and len(met) < 2:
            met.append(engine)  # before, or the quicker one would come here again
            both.wait()  # neither goes on before the other is there

    async def main(model: AsyncEdgeVLM) -> None:
        fake.journal.during = work
        found = await asyncio.gather(
            *(model.ask((), question, max_tokens=4) for question in ("A?", "B?"))
        )
        fake.journal.during = lambda _: None
        for question, answer in zip(("A?", "B?"), found, strict=True):
            alone = await model.ask((), question, max_tokens=4)
            assert alone.token_ids == answer.token_ids

    run(fake, main)


@pytest.mark.parametrize("engine", ["vision", "decoder"])
def test_a_cancelled_task_stops_its_work(fake: FakeEngine, engine: str) -> None:
    async def main(model: AsyncEdgeVLM) -> None:
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def work(of: str) -> None:
            if of == engine:
                loop.call_soon_threadsafe(begun.set)
                time.sleep(0.05)

        async with model.chat(max_tokens=100) as chat:
            fake.journal.during = work
            task = asyncio.create_task(chat.ask(picture(), "What?"))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            fake.journal.during = lambda _: None
            n_calls = len(fake.journal.calls)
            await asyncio.sleep(0.1)
            assert len(fake.journal.calls) == n_calls  # it is not going on behind our back
            answer = await chat.ask(picture(), "What?", max_tokens=8)
            assert answer.token_ids == replayed(fake, chat.chat, answer)

    run(fake, main)


def test_a_token_of_the_callers_stops_it_too(fake: FakeEngine) -> None:
    async def main(model: AsyncEdgeVLM) -> None:
        fake.enqueue("a long answer")
        cancel = CancelToken()
        stream = model.stream((), "What?", cancel=cancel)
        assert await stream.__anext__() == "a"
        cancel.set()
        with pytest.raises(Cancelled):
            await stream.result()

    run(fake, main)


def test_what_is_not_read_to_its_end_is_stopped(fake: FakeEngine) -> None:
    async def main(model: AsyncEdgeVLM) -> None:
        fake.enqueue("a long answer")
        async with model.stream((), "What?") as stream:
            async for piece in stream:
                assert piece == "a"
                break
        await stream.aclose()  # again
        assert not fake.decoder.contexts[0].is_open

    run(fake, main)


def test_errors_are_raised_where_they_are_awaited(fake: FakeEngine) -> None:
    async def main(model: AsyncEdgeVLM) -> None:
        stream = model.stream(picture())
        with pytest.raises(PromptError, match="no question"):
            await stream.result()
        fake.fail("context.append_tokens", DecoderError("no memory"))
        with pytest.raises(DecoderError, match="no memory"):
            await model.ask((), "What?")
        assert (await model.ask((), "What?", max_tokens=1)).token_ids

    run(fake, main)
