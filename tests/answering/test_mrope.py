"""Turns of a toy model with M-RoPE: a picture has as many cells as rows, and fewer positions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edge_vlm import Answer, Cancelled, CancelToken, EdgeVLM, Progress
from tests.answering.test_turns import picture, replayed
from tests.fake_engine import FakeContext, FakeDecoder, FakeEngine
from tests.toy import mrope

N_ROWS = 44  # of picture()
TAKEN = 8  # positions: it stands in six rows of eight


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    with mrope.installed(tmp_path / "package"):
        yield FakeEngine(tmp_path / "toy-bundle", mrope.FAMILY, has_mrope=True)


@pytest.fixture
def model(fake: FakeEngine) -> Iterator[EdgeVLM]:
    with fake.load() as loaded:
        yield loaded


def text(start: int, n: int) -> npt.NDArray[np.int32]:
    """Positions of tokens: the same three times, counting on."""
    return np.repeat(np.arange(start, start + n, dtype=np.int32)[:, None], 3, axis=1)


def grid(start: int, n: int, width: int = 8) -> npt.NDArray[np.int32]:
    """Positions of a picture's rows: one time, then row and column."""
    return np.array([[start, start + i // width, start + i % width] for i in range(n)], np.int32)


def positions(context: FakeContext, first: int = 0) -> npt.NDArray[np.int32]:
    """What the decoder was given since the call of number ``first``."""
    found = [one.positions for one in context.appended[first:] if one.positions is not None]
    assert len(found) == len(context.appended[first:])
    return np.concatenate(found)


def test_a_question_goes_on_behind_the_largest_position(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue("Yes")
    answer = model.ask(picture(), "What?")
    (context,) = fake.decoder.contexts
    before, after = len("E User: "), len(" What? Assistant:")  # E: the token at the beginning
    behind = before + TAKEN
    expected = [text(0, before), grid(before, N_ROWS), text(behind, after + len("Yes"))]
    assert np.array_equal(positions(context), np.concatenate(expected))
    assert answer.image_tokens == N_ROWS
    assert answer.prompt_tokens == before + N_ROWS + after
    assert context.n_positions == answer.prompt_tokens + len("Yes")
    assert context.next_position == behind + after + len("Yes")


def test_a_follow_up_and_a_second_picture_go_on_there(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue(" Yes.", " Grey.", " No.")
    with model.chat() as chat:
        first = chat.ask(picture(), "What?")
        (context,) = fake.decoder.contexts
        start, n_before = context.next_position, len(context.appended)
        assert start == context.n_positions - N_ROWS + TAKEN
        second = chat.ask("Which colour?")
        assert second.cached_tokens == first.prompt_tokens + len(" Yes.")
        said = len(" User: Which colour? Assistant: Grey.")
        assert np.array_equal(positions(context, n_before), text(start, said))
        n_before, start = len(context.appended), start + said
        third = chat.ask(picture(2, 20, 20), "And this?")
        n_rows = third.image_tokens - N_ROWS
        taken = max(8, -(-n_rows // 8))
        front = len(" User: ")
        expected = [
            text(start, front),
            grid(start + front, n_rows),
            text(start + front + taken, len(" And this? Assistant: No.")),
        ]
        assert np.array_equal(positions(context, n_before), np.concatenate(expected))
        assert third.cached_tokens == second.prompt_tokens + len(" Grey.")


def test_what_is_taken_back_frees_its_positions(model: EdgeVLM, fake: FakeEngine) -> None:
    """Another question about the picture, a picture less, and one in the place of another."""
    with model.chat(max_tokens=5) as chat:
        chat.ask(picture(), "What?")
        (context,) = fake.decoder.contexts
        chat.undo()
        n_before = len(context.appended)
        answer = chat.ask(picture(), "Which colour?")
        same = len(" Wh")
        assert answer.cached_tokens == len("E User: ") + N_ROWS + same
        behind = len("E User: ") + TAKEN + same
        asked = len("ich colour? Assistant:")
        assert np.array_equal(positions(context, n_before)[:asked], text(behind, asked))
        assert answer.token_ids == replayed(fake, chat, answer)
        chat.ask(picture(2), "And this?")
        chat.undo()
        for other in (picture(3, 20, 20), picture(2)):
            answer = chat.ask(other, "And this?")
            assert answer.token_ids == replayed(fake, chat, answer)
            chat.undo()


@pytest.mark.parametrize("n_events", range(9, 14))
def test_what_was_stopped_leaves_no_part_of_a_picture(
    model: EdgeVLM, fake: FakeEngine, n_events: int
) -> None:
    """Behind the vision tower's eight events; the picture needs two batches."""
    cancel, left = CancelToken(), [n_events]

    def stop(_: Progress) -> None:
        left[0] -= 1
        if not left[0]:
            cancel.set()

    with model.chat(max_tokens=5) as chat:
        with pytest.raises(Cancelled):
            chat.ask(picture(), "What?", progress=stop, cancel=cancel)
        (context,) = fake.decoder.contexts
        before = len("E User: ")
        n_left = context.n_positions
        assert n_left in (0, before) or n_left >= before + N_ROWS
        answer = chat.ask(picture(), "Which colour?")
        assert answer.token_ids == replayed(fake, chat, answer)


class PictureLast(FakeDecoder):
    """Its template writes a question and then the picture, with nothing behind."""

    @property
    def chat_template(self) -> str:
        return (
            "{% for message in messages %}{% for part in message.content | reverse %}"
            "{{ part.text if part.type == 'text' else '<|image|>' }}"
            "{% endfor %}{% endfor %}"
        )


def test_a_picture_at_the_end_is_computed_again(fake: FakeEngine) -> None:
    """Its last row alone, as is needed for the logits, cannot be taken back."""
    fake.decoder = PictureLast(fake.journal, has_mrope=True)
    with fake.load() as model, model.chat(max_tokens=5) as chat:
        first = chat.ask(picture(), "What?")
        chat.undo()
        second = chat.ask(picture(), "What?")
        assert second.cached_tokens == first.prompt_tokens - N_ROWS
        assert second.token_ids == first.token_ids == replayed(fake, chat, second)


def test_a_handle_keeps_its_positions(model: EdgeVLM, fake: FakeEngine) -> None:
    expected = model.ask(picture(), "What?", max_tokens=8)
    handle = model.encode(picture())
    with model.chat(max_tokens=8) as chat:
        answer = chat.ask(handle, "What?")
        assert answer.token_ids == expected.token_ids == replayed(fake, chat, answer)


def test_a_second_process_goes_on_behind_the_picture(fake: FakeEngine, tmp_path: Path) -> None:
    def ask(question: str, cache: Path | None) -> Answer:
        with fake.load(cache=cache) as model:
            return model.ask(picture(), question, max_tokens=12)

    first = ask("What?", tmp_path / "cache")
    second = ask("And?", tmp_path / "cache")
    assert (first.restored_tokens, second.restored_tokens) == (0, len("E User: ") + N_ROWS)
    assert second.encoded_crops == second.cached_crops == 0
    (asked,) = [a for a in fake.decoder.contexts[-1].appended if len(a.ids) > 1]
    assert asked.positions is not None
    assert asked.positions[0].tolist() == 3 * [len("E User: ") + TAKEN]
    assert first.token_ids == ask("What?", None).token_ids
    assert second.token_ids == ask("And?", None).token_ids


def test_other_positions_are_another_prefix(fake: FakeEngine, tmp_path: Path) -> None:
    """The same pixels, settings, ids and engines, placed as another family places them."""
    answers = []
    for family in (mrope.FAMILY, mrope.NARROW):
        other = FakeEngine(tmp_path / family.name, family, has_mrope=True)
        with other.load(cache=tmp_path / "cache") as model:
            answers.append(model.ask(picture(), "What?", max_tokens=8))
    first, second = answers
    assert second.restored_tokens == 0
    assert second.cached_crops == 7
    assert first.token_ids != second.token_ids
