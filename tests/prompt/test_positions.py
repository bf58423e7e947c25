"""A prompt as positions: where pictures are, and how much of it is cached."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.prompt.builder import (
    ImageSpan,
    Rendered,
    TokenSpan,
    common_prefix,
    identity,
    picture_ends,
    prompt_ids,
    rest_of,
    runs_of,
)

PICTURES: Any = [SimpleNamespace(n_tokens=n, digest=bytes([n])) for n in (3, 2, 4)]
# Runs of tokens, and of pictures with at least one row each.
prompts = st.lists(st.lists(st.integers(0, 99), max_size=4) | st.integers(1, 4), max_size=6)


def ids_of(prompt: list[Any]) -> list[int]:
    ids: list[int] = []
    n_pictures = 0
    for part in prompt:
        if isinstance(part, int):
            n_pictures += 1
            ids += [-n_pictures] * part
        else:
            ids += part
    return ids


def test_pictures_take_as_many_positions_as_they_have_rows() -> None:
    spans = [TokenSpan((5, 6)), ImageSpan(0), ImageSpan(1), TokenSpan((7,))]
    assert prompt_ids(spans, PICTURES, 0) == (5, 6, -1, -1, -1, -2, -2, 7)
    assert prompt_ids(spans, PICTURES, 1) == (5, 6, -2, -2, *[-3] * 4, 7)
    assert prompt_ids([], PICTURES, 0) == ()


def test_a_picture_is_known_by_its_content() -> None:
    assert identity((5, -1, -2, 6), PICTURES) == (5, bytes([3]), bytes([2]), 6)
    assert identity((5, -2, -1, 6), [*PICTURES[1::-1]]) == (5, bytes([3]), bytes([2]), 6)


@pytest.mark.parametrize(
    ("ids", "cached", "n"),
    [
        ((1, 2, 3), (1, 2, 3), 2),  # one is left to compute logits from
        ((1, 2, 3), (1, 2), 2),
        ((1, 2, 3), (1, 9, 3), 1),
        ((1, 2, 3), (), 0),
        ((), (1, 2), 0),
        ((1,), (1,), 0),
        ((1, b"a", 2), (1, b"a", 3), 2),
    ],
)
def test_what_is_cached_of_a_prompt(ids: tuple[Any], cached: tuple[Any], n: int) -> None:
    assert common_prefix(ids, cached) == n


@given(prompts, st.data())
def test_runs_cover_a_prompt_and_hold_one_kind(prompt: list[Any], data: st.DataObject) -> None:
    ids = ids_of(prompt)
    start = data.draw(st.integers(0, len(ids)))
    runs = list(runs_of(ids, start))
    assert [position for run in runs for position in range(*run)] == list(range(start, len(ids)))
    for first, stop in runs:
        part = ids[first:stop]
        assert min(part) >= 0 or len(set(part)) == 1
    for (_, stop), (first, _) in itertools.pairwise(runs):
        assert ids[stop - 1] != ids[first] or ids[first] >= 0
        assert min(ids[stop - 1], ids[first]) < 0  # otherwise they would be one


@given(prompts)
def test_pictures_end_where_something_else_follows(prompt: list[Any]) -> None:
    ids = ids_of(prompt)
    n_pictures = sum(isinstance(part, int) for part in prompt)
    ends = picture_ends(ids)
    assert len(ends) == n_pictures
    assert all(ids[end - 1] == -1 - number for number, end in enumerate(ends))
    assert all(ids[end : end + 1] != [ids[end - 1]] for end in ends)


@given(st.text("ab<", max_size=12), st.integers(0, 12))
def test_the_rest_of_a_text_keeps_its_marks(text: str, n: int) -> None:
    """User text has a mark behind each character that could begin a special token."""
    mark = "\U000f0000"
    rendered = Rendered("".join(c + mark if c == "<" else c for c in text), mark)
    rest = rest_of(rendered, n)
    assert rest.plain == text[n:]
    assert rendered.text.endswith(rest.text)
    assert not rest.text.startswith(mark)
