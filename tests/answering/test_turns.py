"""Turns of a toy model: what goes into the KV cache, what comes out, and what stays for the next.

Where an answer is not written by the test, it depends on every position of the context, so that
``replayed`` finds whatever a cache got wrong.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_vlm import Answer, Chat, EdgeVLM, Progress, PromptError
from edge_vlm.families.jina_vlm.tiling import cut_tiles, stitch
from edge_vlm.pictures.picture import Picture
from tests.fake_engine import FakeContext, FakeEngine
from tests.toy import tower as toy
from tests.toy.sizes import END, FIRST_WORD, IM_PATCH, PROCESSOR, VOCAB_SIZE

Pixels = npt.NDArray[np.uint8]


def picture(seed: int = 0, height: int = 40, width: int = 52) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def words(*numbers: int) -> list[int]:
    return [FIRST_WORD + number for number in numbers]


@pytest.fixture
def model(fake: FakeEngine) -> Iterator[EdgeVLM]:
    with fake.load() as loaded:
        yield loaded


def rows_of(seen: Picture) -> npt.NDArray[np.float32]:
    """What stands for a picture, which may not be encoded yet."""
    if seen.rows is not None:
        return seen.rows
    assert seen.pixels is not None
    tiles = cut_tiles(seen.pixels, seen.processor)
    return stitch(toy.embed(tiles.crops, tiles.is_last), toy.MARKERS, tiles.plan, seen.processor)


def replayed(fake: FakeEngine, chat: Chat, answer: Answer) -> tuple[int, ...]:
    """The last answer's ids, from the same input with nothing cached."""
    state = chat.conversation.state
    context = FakeContext(type(fake.decoder)(has_mrope=fake.decoder.has_mrope), 4096)
    ids = state.ids[: answer.prompt_tokens]
    for start in range(len(ids)):
        if ids[start] >= 0:
            context.append_tokens([ids[start]], logits=True)
        elif start == 0 or ids[start - 1] != ids[start]:
            seen = state.pictures[-1 - ids[start]]
            context.append_embeddings(rows_of(seen), positions=seen.positions, logits=True)
    found: list[int] = []
    while len(found) < len(answer.token_ids):
        found.append(int(context.scores[:VOCAB_SIZE].argmax()))
        context.append_tokens(found[-1:], logits=True)
    return tuple(found)


def spelled(fake: FakeEngine, chat: Chat) -> str:
    """What the conversation's positions say, a picture as the template writes it."""
    ids, found = chat.conversation.state.ids, b""
    for before, value in zip((0, *ids), ids, strict=False):
        if value >= 0:
            found += fake.decoder.piece(value)
        elif value != before:
            found += b"<|image|>"
    return found.decode("utf-8", "replace")


def test_an_answer_is_what_the_decoder_says(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue("A cat.")
    answer = model.ask((), "What is it?")
    assert str(answer) == "A cat."
    assert answer.token_ids == tuple(b"A cat.")
    assert (answer.finish_reason, answer.images) == ("stop", ())
    (context,) = fake.decoder.contexts
    said = b" User: What is it? Assistant:"
    assert context.appended[0].ids == (END, *said)
    assert answer.prompt_tokens == 1 + len(said)
    assert [one.ids for one in context.appended[1:]] == [(byte,) for byte in b"A cat."]
    assert all(one.logits for one in context.appended)
    assert not context.is_open


def test_a_picture_goes_in_as_rows_between_its_words(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue("Noise.")
    answer = model.ask(picture(), "What?")
    before, block, after, *_ = fake.decoder.contexts[0].appended
    tiles = cut_tiles(picture(), PROCESSOR)
    rows = stitch(toy.embed(tiles.crops, tiles.is_last), toy.MARKERS, tiles.plan, PROCESSOR)
    assert before.ids == (END, *b" User: ")
    assert block.rows is not None
    assert np.array_equal(block.rows, rows)
    assert after.ids == tuple(b" What? Assistant:")
    assert [one.logits for one in (before, block, after)] == [False, False, True]
    assert answer.image_tokens == len(rows) == 44
    assert answer.prompt_tokens == len(before.ids) + 44 + len(after.ids)
    assert (answer.encoded_crops, answer.cached_crops) == (7, 0)
    assert answer.images[0].tiling == tiles.plan.tiling


def test_a_follow_up_adds_only_what_is_new(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue(" Noise.", " Grey.")
    with model.chat() as chat:
        first = chat.ask(picture(), "What?")
        (context,) = fake.decoder.contexts
        n_before = len(context.appended)
        second = chat.ask("Which colour?")
        new = b" User: Which colour? Assistant:"
        assert context.appended[n_before].ids == tuple(new)
        assert second.cached_tokens == first.prompt_tokens + len(" Noise.")
        assert second.prompt_tokens == second.cached_tokens + len(new)
        assert [message.text for message in chat.messages] == [
            *("What?", "Noise.", "Which colour?", "Grey.")
        ]
    assert fake.decoder.contexts == [context]
    assert fake.journal.n("vision.encode") == 7


def test_what_was_generated_keeps_its_ids(model: EdgeVLM, fake: FakeEngine) -> None:
    """Text would be tokenized again as bytes; the cached words stay."""
    fake.enqueue(words(0, 1), "Yes.")
    with model.chat() as chat:
        first = chat.ask("What is it?")
        assert first.answer == "the cat"
        second = chat.ask("Sure?")
        assert second.cached_tokens == first.prompt_tokens + 2
        assert chat.conversation.state.ids[first.prompt_tokens :][:2] == tuple(words(0, 1))


@pytest.mark.parametrize("answer", ["the cat", "  the cat", "the cat \n"])
def test_an_answer_that_is_rendered_otherwise_is_computed_again(
    model: EdgeVLM, fake: FakeEngine, answer: str
) -> None:
    """The template writes one space in front of it; what is not that is another prompt."""
    fake.enqueue(answer)
    with model.chat(max_tokens=12) as chat:
        first = chat.ask("What is it?")
        assert first.answer == answer.strip()
        second = chat.ask("Sure?")
        assert first.prompt_tokens <= second.cached_tokens < second.prompt_tokens
        assert second.token_ids == replayed(fake, chat, second)


def test_several_pictures_come_in_order(model: EdgeVLM, fake: FakeEngine) -> None:
    one, two = picture(1), picture(2, 20, 20)
    with model.chat(max_tokens=8) as chat:
        both = chat.ask([one, two], "Compare.")
        blocks = [a.rows for a in fake.decoder.contexts[0].appended if a.rows is not None]
        assert [len(rows) for rows in blocks] == [44, both.image_tokens - 44]
        assert [used.size for used in both.images] == [(52, 40), (20, 20)]
        assert both.token_ids == replayed(fake, chat, both)
        third = chat.ask(picture(3), "And this?")
        assert third.token_ids == replayed(fake, chat, third)
        assert third.cached_tokens >= both.prompt_tokens
        assert len(third.images) == 3
    found = {
        model.ask(pictures, "Compare.", max_tokens=8).token_ids
        for pictures in ([one, two], [two, one], [one, one], one)
    }
    assert both.token_ids in found
    assert len(found) == 4


def test_the_cache_grows_and_keeps_what_it_holds(model: EdgeVLM, fake: FakeEngine) -> None:
    with model.chat(max_tokens=30) as chat:
        sizes = set()
        for number in range(12):
            answer = chat.ask(f"Question {number}: tell me more about every single part.")
            assert answer.token_ids == replayed(fake, chat, answer)
            sizes.add(answer.kv_bytes)
        assert len(sizes) > 2
    assert len(fake.decoder.contexts) == 1


def test_pieces_are_whole_characters(model: EdgeVLM, fake: FakeEngine) -> None:
    """A character may be several tokens, or half of it never come."""
    fake.enqueue("äß€😀", [*words(3), *"é".encode()[:1]])
    with model.stream((), "Say it.") as stream:
        pieces = list(stream)
    assert pieces == ["ä", "ß", "€", "😀"]
    assert stream.answer.answer == "äß€😀"
    with model.stream((), "Say it.") as stream:
        pieces = list(stream)
    assert pieces == ["α", "\N{REPLACEMENT CHARACTER}"]
    assert "".join(pieces) == stream.answer.answer


def test_space_in_front_is_not_shown(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue("  \n two words ")
    with model.stream((), "Say it.") as stream:
        assert "".join(stream) == "two words "
    assert stream.answer.answer == "two words"


def test_an_answer_ends_at_its_limit(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue("endless", "", "12")
    cut = model.ask((), "Go on.", max_tokens=3)
    assert (cut.answer, cut.finish_reason) == ("end", "length")
    empty = model.ask((), "Go on.", max_tokens=3)
    assert (empty.answer, empty.token_ids, empty.finish_reason) == ("", (), "stop")
    whole = model.ask((), "Go on.", max_tokens=2)  # the end would have been the third
    assert (whole.answer, whole.finish_reason) == ("12", "length")


def test_options_reach_the_sampler(model: EdgeVLM, fake: FakeEngine) -> None:
    model.ask((), "Hi", temperature=0.5, top_p=0.9, min_p=0.1, seed=7, max_tokens=1)
    assert fake.decoder.sampled == [{"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "seed": 7}]
    for _ in range(2):
        model.ask((), "Hi", max_tokens=1)
    assert fake.decoder.sampled[1]["temperature"] == 0
    assert fake.decoder.sampled[1]["seed"] != fake.decoder.sampled[2]["seed"]
    said = {model.ask((), "Hi", temperature=1.0, seed=s, max_tokens=4).token_ids for s in (1, 1, 2)}
    assert len(said) == 2


def test_ids_that_are_only_read_are_never_said(model: EdgeVLM) -> None:
    answer = model.ask((), "Hi", temperature=100.0, seed=1, max_tokens=200)
    assert max(answer.token_ids) < VOCAB_SIZE <= IM_PATCH


def test_a_system_message_is_said_once(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue("Yes.", "No.", "Well.")
    with model.chat(system="Be brief.") as chat:
        chat.ask("One?")
        chat.ask("Two?")
        roles = [message.role for message in chat.messages]
        assert roles == ["system", "user", "assistant", "user", "assistant"]
    model.ask((), "One?", system="Be brief.")
    start = (END, *b" System: Be brief. User: One? Assistant:")
    assert all(context.appended[0].ids == start for context in fake.decoder.contexts)


def test_a_whole_conversation_is_a_prompt(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue("Noise.", "Grey.", "Grey.")
    with model.chat() as chat:
        chat.ask(picture(), "What?")
        second = chat.ask("Which colour?")
    told = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_url(picture())}},
                {"type": "text", "text": "What?"},
            ],
        },
        {"role": "assistant", "content": "Noise."},
        {"role": "user", "content": "Which colour?"},
    ]
    whole = model.ask(messages=told)
    assert whole.prompt_tokens == second.prompt_tokens
    assert whole.cached_crops == 7
    with pytest.raises(PromptError, match="either"):
        model.ask((), "And?", messages=told)


def data_url(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_progress_is_told_of_every_stage(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue("Noise.")
    seen: list[Progress] = []
    answer = model.ask(picture(), "What?", max_tokens=9, progress=seen.append)
    n = answer.prompt_tokens
    told = {
        stage: [(p.done, p.total) for p in seen if p.stage == stage]
        for stage in ("vision", "prefill", "decode")
    }
    assert told["vision"] == [(done, 7) for done in range(8)]
    assert told["prefill"] == [(0, n), (8, n), (40, n), (52, n), (n, n)]  # batches of 32
    assert told["decode"] == [(done, 9) for done in range(1, 7)]
    assert [p.stage for p in seen] == sorted(
        (p.stage for p in seen), key=["vision", "prefill", "decode"].index
    )


def test_every_counter_is_plain_data(model: EdgeVLM) -> None:
    answer = model.ask(picture(), "What?", max_tokens=4)
    data = json.loads(json.dumps(answer.to_dict()))
    assert data["images"] == [
        {
            "size": [52, 40],
            "resized": [52, 40],
            "tiling": [2, 3],
            "crops": 7,
            "reduced": False,
            "used": [44, 32],
            "alpha": None,
            "crop": None,
        }
    ]
    assert data["timings"]["prefill"] > 0
    assert data["timings"]["decode_tokens_per_second"] > 0
    assert data["kv_bytes"] == 256 * 64


def test_threads_share_a_model(model: EdgeVLM) -> None:
    pictures = [picture(seed) for seed in range(3)]
    expected = [model.ask(one, "What?", max_tokens=12).token_ids for one in pictures]
    found: dict[int, tuple[int, ...]] = {}

    def work(number: int) -> None:
        found[number] = model.ask(pictures[number % 3], "What?", max_tokens=12).token_ids

    threads = [threading.Thread(target=work, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: expected[number % 3] for number in range(9)}


def test_a_handle_stands_for_its_picture(model: EdgeVLM, fake: FakeEngine) -> None:
    handle = model.encode(picture(), max_tiles=2)
    assert handle.n_tokens == handle.rows.shape[0]
    expected = model.ask(picture(), "What?", max_tiles=2, max_tokens=8)
    n_encoded = fake.journal.n("vision.encode")
    with model.chat(max_tokens=8) as chat:
        first = chat.ask(handle, "What?")
        assert first.token_ids == expected.token_ids
        assert (first.encoded_crops, first.cached_crops) == (0, 0)
        second = chat.ask("And?")
        assert second.cached_tokens >= first.prompt_tokens
        assert second.token_ids == replayed(fake, chat, second)
        assert chat.ask([handle, picture()], "Compare.").cached_crops == 1  # the thumbnail
    assert fake.journal.n("vision.encode") == n_encoded + 6


def test_a_handle_of_fewer_tiles_is_not_looked_at_again(
    model: EdgeVLM, fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    handle = model.encode(picture(), max_tiles=2)
    fake.enqueue(words(0, 1))
    with model.chat(max_tokens=8) as chat:
        first = chat.ask(handle, "What?")
        assert chat.ask("And?").cached_tokens == first.prompt_tokens + 2
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("asked", "options", "reason"),
    [
        (((), ""), {}, "empty"),
        (((), "  "), {}, "empty"),
        (("What is it?",), {}, "no question"),
        (((), 3), {}, "the question last"),
        (((), "Hi"), {"max_tokens": 0}, "max_tokens"),
        (((), "Hi"), {"nonsense": 1}, "nonsense"),
        (((), "Hi"), {"choices": ["a", "b"], "regex": "a"}, "give one of them"),
        (((), "\ud800"), {}, "surrogate"),
    ],
)
def test_bad_requests_touch_no_engine(
    model: EdgeVLM, fake: FakeEngine, asked: tuple[Any, ...], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PromptError, match=reason):
        model.ask(*asked, **options)
    assert not fake.decoder.contexts
    assert set(fake.journal.calls) <= {"context.truncate"}
