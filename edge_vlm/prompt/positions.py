"""A prompt as positions of the KV cache, and what of it is there already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edge_vlm.pictures.picture import Picture
from edge_vlm.prompt.builder import Rendered, Span, TokenSpan


def prompt_ids(
    spans: Sequence[Span], pictures: Sequence[Picture], n_before: int
) -> tuple[int, ...]:
    """One number a position: a token id, or -1 - i where picture i's rows go.

    The spans' own pictures are those of ``pictures`` behind the first ``n_before``.
    """
    ids: list[int] = []
    for span in spans:
        if isinstance(span, TokenSpan):
            ids += span.ids
        else:
            index = n_before + span.index
            ids += [-1 - index] * pictures[index].n_tokens
    return tuple(ids)


def rest_of(rendered: Rendered, n_plain: int) -> Rendered:
    """What follows the first ``n_plain`` characters that are not marks."""
    for index, character in enumerate(rendered.text):
        if n_plain == 0 and character != rendered.mark:
            return Rendered(rendered.text[index:], rendered.mark)
        if character != rendered.mark:
            n_plain -= 1
    return Rendered("", rendered.mark)


def identity(ids: Sequence[int], pictures: Sequence[Picture]) -> tuple[int | bytes, ...]:
    """As ``ids``, but the same for the same picture whatever its number."""
    return tuple(value if value >= 0 else pictures[-1 - value].digest for value in ids)


def common_prefix(ids: Sequence[int | bytes], cached: Sequence[int | bytes]) -> int:
    """Leading positions that are the same; at least one is left to compute logits from."""
    n = 0
    for new, old in zip(ids[:-1], cached, strict=False):
        if new != old:
            break
        n += 1
    return n


def picture_ends(ids: Sequence[int]) -> list[int]:
    """The positions behind each picture."""
    return [
        index + 1
        for index, value in enumerate(ids)
        if value < 0 and (index + 1 == len(ids) or ids[index + 1] != value)
    ]


def runs_of(ids: Sequence[int], start: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of tokens and of single pictures' rows, from position ``start`` on."""
    while start < len(ids):
        stop = start + 1
        while stop < len(ids) and (ids[stop] == ids[start] if ids[start] < 0 else ids[stop] >= 0):
            stop += 1
        yield start, stop
        start = stop
