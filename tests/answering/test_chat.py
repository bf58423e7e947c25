"""Conversations: what is cached, what a stopped turn leaves, cancelling, closing, threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_vlm import (
    Answer,
    BudgetError,
    Cancelled,
    CancelToken,
    Chat,
    DecoderError,
    EdgeVLM,
    MachineSettings,
    Progress,
    PromptError,
)
from edge_vlm.prompt.messages import ImagePart
from tests.conftest import GoldenModel

MODEL = "tiny-126-tied"


@pytest.fixture(scope="module")
def vlm(bundle: Callable[..., Path]) -> Iterator[EdgeVLM]:
    with EdgeVLM.load(bundle(MODEL), settings=MachineSettings(threads=1)) as loaded:
        yield loaded


@pytest.fixture
def chart(golden: dict[str, GoldenModel]) -> Path:
    return golden[MODEL].cases["image_chart"].images[0]


@pytest.fixture
def icon(golden: dict[str, GoldenModel]) -> Path:
    return golden[MODEL].cases["image_icon_rgba"].images[0]


def recomputed(vlm: EdgeVLM, chat: Chat, answer: Answer) -> tuple[int, ...]:
    """The last answer's ids, computed again from the same input with nothing cached.

    Not by asking with the whole conversation as text: what a random model generates is not the
    canonical tokenization of any text.
    """
    engine = vlm.engine
    assert engine is not None
    state = chat.conversation.state
    ids = state.ids[: answer.prompt_tokens]
    found: list[int] = []
    with (
        engine.decoder.context(len(ids) + len(answer.token_ids)) as context,
        engine.decoder.sampler(temperature=0, top_p=1, min_p=0, seed=0) as sampler,
    ):
        for value, group in itertools.groupby(ids, key=lambda i: i if i < 0 else 0):
            part = list(group)
            rows = None if value >= 0 else state.pictures[-1 - value].rows
            if rows is None:
                context.append_tokens(part, logits=True)
            else:
                context.append_embeddings(rows)
        while len(found) < len(answer.token_ids):
            found.append(sampler.sample(context))
            context.append_tokens(found[-1:], logits=True)
    return tuple(found)


def test_a_follow_up_answers_as_without_a_cache(vlm: EdgeVLM, chart: Path, icon: Path) -> None:
    with vlm.chat(max_tokens=8) as chat:
        chat.ask(chart, "What is shown?")
        second = chat.ask([icon], "And in this one?")
        assert second.token_ids == recomputed(vlm, chat, second)
        last = chat.ask("Compare them.")
        assert last.image_tokens == 130 + 64
        assert last.token_ids == recomputed(vlm, chat, last)


def test_a_conversation_given_whole_has_the_same_prompt(vlm: EdgeVLM, chart: Path) -> None:
    """Where the answer is plain text, the chat's prompt is that of the whole conversation."""
    with vlm.chat(max_tokens=1) as chat:
        first = chat.ask(chart, "What is shown?")
        second = chat.ask("And what else?")
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": str(chart)}},
                {"type": "text", "text": "What is shown?"},
            ],
        },
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": "And what else?"},
    ]
    whole = vlm.ask(messages=messages, max_tokens=1)
    assert (whole.prompt_tokens, whole.token_ids) == (second.prompt_tokens, second.token_ids)


def test_a_follow_up_costs_only_its_own_tokens(vlm: EdgeVLM, chart: Path) -> None:
    with vlm.chat(max_tokens=8) as chat:
        first = chat.ask(chart, "What is shown?")
        seen: list[Progress] = []
        second = chat.ask("And what else?", progress=seen.append)
        assert not [progress for progress in seen if progress.stage == "vision"]
        assert second.image_tokens == first.image_tokens
        # All of the first prompt is kept; what is new are the answer and the question.
        assert second.cached_tokens >= first.prompt_tokens
        engine = vlm.engine
        assert engine is not None
        own = engine.decoder.tokenize(f" {first.answer} User: And what else? Assistant:")
        assert second.prompt_tokens - second.cached_tokens <= len(own) + 2


def test_generated_ids_stay_cached_when_the_text_is_rendered_alike(vlm: EdgeVLM) -> None:
    """An answer that begins with the space the template puts there is not prefilled again."""
    for seed in range(200):
        with vlm.chat(max_tokens=4, temperature=2.0) as chat:
            first = chat.ask("Hello", seed=seed)
            state = chat.conversation.state
            raw = state.text.rpartition("Assistant:")[2]
            engine = vlm.engine
            assert engine is not None
            canonical = engine.decoder.tokenize(f"Assistant:{raw} User:")
            if not raw.startswith(" ") or _contains(canonical, first.token_ids[:-1]):
                continue  # tokenizing the text again would do as well
            second = chat.ask("More", max_tokens=1, seed=0)
            # The last generated id was sampled but not computed yet.
            expected = first.prompt_tokens + len(first.token_ids) - 1
            if first.finish_reason == "stop":
                expected += 1
            assert second.cached_tokens == expected
            return
    pytest.fail("no seed gave an answer that begins with a space and is tokenized differently")


def _contains(ids: list[int], part: tuple[int, ...]) -> bool:
    return any(tuple(ids[i : i + len(part)]) == part for i in range(len(ids)))


def test_the_kv_cache_grows_and_keeps_what_it_holds(vlm: EdgeVLM, chart: Path) -> None:
    with vlm.chat(max_tokens=16) as chat:
        sizes = [chat.ask(chart, "What is shown?").kv_bytes]
        for _ in range(6):
            answer = chat.ask("Tell me more about every single part of the picture, please.")
            sizes.append(answer.kv_bytes)
            assert answer.cached_tokens > 150
        assert sizes[-1] > sizes[0]
        assert answer.token_ids == recomputed(vlm, chat, answer)


def test_a_system_message_comes_first(vlm: EdgeVLM) -> None:
    with vlm.chat(system="Be brief.", max_tokens=2) as chat:
        chat.ask("Hello")
        chat.ask("Again")
        assert [message.role for message in chat.messages] == [
            *("system", "user", "assistant", "user", "assistant")
        ]
    alone = vlm.ask((), "Hello", max_tokens=2)
    assert vlm.ask((), "Hello", system="Be brief.", max_tokens=2).prompt_tokens > (
        alone.prompt_tokens
    )


@pytest.mark.parametrize("stage", ["vision", "prefill", "decode"])
def test_cancelling_takes_the_turn_back(vlm: EdgeVLM, chart: Path, stage: str) -> None:
    with vlm.chat(max_tokens=8) as chat:
        first = chat.ask("Hello")
        cancel = CancelToken()

        def stop(progress: Progress) -> None:
            if progress.stage == stage:
                cancel.set()

        with pytest.raises(Cancelled):
            chat.ask(chart, "What is shown?", progress=stop, cancel=cancel)
        assert len(chat.messages) == 2
        answer = chat.ask("And now?")
        assert answer.cached_tokens >= first.prompt_tokens
        assert answer.token_ids == recomputed(vlm, chat, answer)


def stopped(
    vlm: EdgeVLM, page: Path, is_time: Callable[[Progress], bool], message: str
) -> list[Progress]:
    """Cancel from a timer that ``is_time`` starts, sooner and later, until it is met inside a call.

    Returns the progress of the call that ended with ``message``.
    """
    for delay in (0.005, 0.02, 0.01, 0.04, 0.002, 0.08, 0.16):
        cancel = CancelToken()
        seen: list[Progress] = []

        def stop_soon(
            progress: Progress,
            seen: list[Progress] = seen,
            cancel: CancelToken = cancel,
            delay: float = delay,
        ) -> None:
            seen.append(progress)
            if is_time(progress):
                threading.Timer(delay, cancel.set).start()

        try:
            vlm.ask(page, "Summarize.", max_tokens=1, progress=stop_soon, cancel=cancel)
        except Cancelled as error:
            if message in str(error):
                return seen
    pytest.fail(f"no call ended with {message!r}")


def test_cancelling_from_another_thread_stops_inside_a_batch(
    bundle: Callable[..., Path], golden: dict[str, GoldenModel]
) -> None:
    """One batch for the whole prompt: only llama.cpp's abort callback can stop it."""
    page = golden["tiny-378"].cases["image_page"].images[0]
    settings = MachineSettings(batch_size=2048, threads=1)
    with EdgeVLM.load(bundle("tiny-378"), settings=settings) as vlm:
        seen = stopped(
            vlm,
            page,
            lambda progress: progress.stage == "prefill" and progress.done < 1000,
            "while the decoder was working",
        )
    assert all(p.done < p.total for p in seen if p.stage == "prefill")


def test_cancelling_inside_a_tile(
    bundle: Callable[..., Path], golden: dict[str, GoldenModel]
) -> None:
    """Between two operators of the graph; the call ends without that tile's output."""
    page = golden["tiny-378"].cases["image_page"].images[0]
    settings = MachineSettings(threads=1, cache=None, tile_memory=0)
    with EdgeVLM.load(bundle("tiny-378"), settings=settings) as vlm:
        seen = stopped(
            vlm,
            page,
            lambda progress: progress.stage == "vision" and progress.done == 1,
            "while encoding the picture",
        )
    assert max(p.done for p in seen if p.stage == "vision") < 13


def test_progress_tells_every_tile_batch_and_token(vlm: EdgeVLM, chart: Path) -> None:
    seen: list[Progress] = []
    answer = vlm.ask(chart, "What is shown?", max_tokens=5, progress=seen.append)
    vision = [p for p in seen if p.stage == "vision"]
    assert [p.done for p in vision] == list(range(8))
    assert all(p.total == 7 for p in vision)
    prefill = [p.done for p in seen if p.stage == "prefill"]
    assert prefill[0] == 0
    assert prefill == sorted(prefill)
    assert prefill[-1] == answer.prompt_tokens
    assert [p.done for p in seen if p.stage == "decode"] == list(range(1, 6))


def test_streamed_pieces_make_the_answer(vlm: EdgeVLM, chart: Path) -> None:
    with vlm.stream(chart, "What is shown?", max_tokens=24) as stream:
        with pytest.raises(DecoderError, match="not complete"):
            _ = stream.answer
        pieces = list(stream)
    assert "".join(pieces).strip() == stream.answer.answer
    assert "�" not in "".join(pieces[:-1]) or "�" in stream.answer.answer
    assert list(stream) == []


def test_images_come_in_many_forms(vlm: EdgeVLM, chart: Path) -> None:
    import base64

    data = chart.read_bytes()
    with Image.open(chart) as image:
        pixels = np.asarray(image.convert("RGB"))
        forms: list[Any] = [
            str(chart),
            chart,
            data,
            image,
            pixels,
            "data:image/png;base64," + base64.b64encode(data).decode(),
        ]
        answers = {vlm.ask(form, "What?", max_tokens=8).token_ids for form in forms}
    assert len(answers) == 1


def test_a_request_over_the_budget_says_what_fits(
    bundle: Callable[..., Path], golden: dict[str, GoldenModel]
) -> None:
    page = golden["tiny-378"].cases["image_page"].images[0]
    per_token = 2 * 3 * 2 * 64 * 2  # K and V, layers, KV heads, head size, f16
    settings = MachineSettings(threads=1, kv_budget=1024 * per_token)
    with EdgeVLM.load(bundle("tiny-378"), settings=settings) as vlm:
        with pytest.raises(BudgetError) as caught:
            vlm.ask(page, "What is the title?")
        message = str(caught.value)
        assert "holds 1024" in message
        tiles = int(message.split("--max-tiles ")[1].split(")")[0])
        answer = vlm.ask(page, "What is the title?", max_tiles=tiles, max_tokens=40)
        assert answer.kv_bytes <= settings.kv_budget
        with pytest.raises(BudgetError):
            vlm.ask(page, "What is the title?", max_tiles=tiles + 1)
        megabytes = int(message.split("--kv-budget ")[1].split("MB")[0])
    settings = MachineSettings(threads=1, kv_budget=megabytes * 1_000_000)
    with EdgeVLM.load(bundle("tiny-378"), settings=settings) as vlm:
        assert vlm.ask(page, "What is the title?", max_tokens=32).image_tokens == 1744


def test_the_budget_also_ends_a_long_answer(bundle: Callable[..., Path]) -> None:
    per_token = 2 * 2 * 1 * 32 * 2
    settings = MachineSettings(threads=1, kv_budget=256 * per_token)
    with EdgeVLM.load(bundle(MODEL), settings=settings) as vlm:
        answer = vlm.ask((), "Go on and on.", max_tokens=4000, temperature=1.0, seed=1)
        assert answer.kv_bytes == settings.kv_budget
        assert answer.finish_reason in ("length", "stop")
        assert answer.prompt_tokens + len(answer.token_ids) <= 256


def test_threads_share_a_model(vlm: EdgeVLM, chart: Path, icon: Path) -> None:
    expected = {path: vlm.ask(path, "What?", max_tokens=8).token_ids for path in (chart, icon)}
    found: list[bool] = []

    def work(path: Path) -> None:
        found.append(vlm.ask(path, "What?", max_tokens=8).token_ids == expected[path])

    threads = [threading.Thread(target=work, args=(path,)) for path in (chart, icon) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6


def test_closing_waits_for_nobody(bundle: Callable[..., Path], chart: Path) -> None:
    vlm = EdgeVLM.load(bundle(MODEL), settings=MachineSettings(threads=1))
    stream = vlm.stream(chart, "What?", max_tokens=8)
    assert next(stream)
    vlm.close()
    vlm.close()
    with pytest.raises(DecoderError, match="the model was closed"):
        list(stream)
    with pytest.raises(DecoderError, match="the model was closed"):
        vlm.ask(chart, "What?")


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        (((), ""), {}, "empty"),
        (((), "  "), {}, "empty"),
        (("What is a barometer?",), {}, "no question"),
        (((), "Hi"), {"max_tokens": 0}, "max_tokens"),
        (((), "Hi"), {"nonsense": 1}, "nonsense"),
        (((), "Hi"), {"messages": [{"role": "user", "content": "Hi"}]}, "either"),
    ],
)
def test_bad_requests_are_refused(
    vlm: EdgeVLM, arguments: tuple[Any, ...], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PromptError, match=reason):
        vlm.ask(*arguments, **options)


def test_a_token_set_before_the_call_stops_at_once(vlm: EdgeVLM, chart: Path) -> None:
    cancel = CancelToken()
    cancel.set()
    started = time.perf_counter()
    with pytest.raises(Cancelled):
        vlm.ask(chart, "What?", cancel=cancel)
    assert time.perf_counter() - started < 5


def test_image_parts_keep_their_source(vlm: EdgeVLM, chart: Path) -> None:
    with vlm.chat(max_tokens=1) as chat:
        chat.ask(chart, "What?")
        part = chat.messages[0].parts[0]
        assert isinstance(part, ImagePart)
        assert part.source == chart
