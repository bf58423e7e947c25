"""The asyncio front: the same answers, progress in the loop, work that stops with its task."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from edge_vlm import AsyncEdgeVLM, Cancelled, CancelToken, EdgeVLM, PromptError

PICTURE = Path(__file__).parents[2] / "examples" / "images" / "receipt-1.png"
QUESTION = "What is the total?"


@pytest.mark.engine
def test_answers_are_those_of_the_ordinary_front() -> None:
    async def main() -> None:
        async with await AsyncEdgeVLM.load("demo") as vlm:
            seen: list[str] = []

            def look(event: object) -> None:
                assert threading.current_thread() is threading.main_thread()
                seen.append(event.stage)  # type: ignore[attr-defined]

            answer = await vlm.ask(PICTURE, QUESTION, progress=look)
            assert str(answer) == "43.98"
            assert {"vision", "prefill", "decode"} <= set(seen)
            stream = vlm.stream(await vlm.encode(PICTURE), QUESTION)
            assert "".join([piece async for piece in stream]) == "43.98"
            assert stream.answer.token_ids == answer.token_ids
            async with vlm.chat(max_tokens=8) as chat:
                assert str(await chat.ask(PICTURE, QUESTION)) == "43.98"
                again = await chat.ask(QUESTION)
                assert again.cached_tokens > answer.prompt_tokens
            first, second = await asyncio.gather(
                vlm.ask(PICTURE, QUESTION), vlm.ask((), "Hello", max_tokens=2)
            )
            assert str(first) == "43.98"
            assert len(second.token_ids) <= 2

    asyncio.run(main())


@pytest.mark.engine
def test_a_cancelled_task_stops_its_answer() -> None:
    async def main() -> None:
        async with await AsyncEdgeVLM.load("demo") as vlm:
            begun = asyncio.Event()
            task = asyncio.create_task(
                vlm.ask(
                    (), "Hello", max_tokens=400, regex="[a-z]{390}", progress=lambda _: begun.set()
                )
            )
            await begun.wait()
            started = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - started < 5
            while any(t.name.startswith("edge-vlm answer") for t in threading.enumerate()):
                assert time.monotonic() - started < 5
                await asyncio.sleep(0.01)
            assert str(await vlm.ask(PICTURE, QUESTION)) == "43.98"

    asyncio.run(main())


@pytest.mark.engine
def test_a_token_of_the_callers_stops_it_too() -> None:
    async def main() -> None:
        vlm = AsyncEdgeVLM(EdgeVLM.load("demo"))
        cancel = CancelToken()
        stream = vlm.stream((), "Hello", regex="[a-z]{390}", max_tokens=400, cancel=cancel)
        assert await stream.__anext__()
        cancel.set()
        with pytest.raises(Cancelled):
            await stream.result()
        await stream.aclose()
        with pytest.raises(PromptError, match="no question"):
            await vlm.ask(PICTURE)
        async with vlm.stream(PICTURE, QUESTION) as left:
            await left.__anext__()
        await vlm.aclose()

    asyncio.run(main())
