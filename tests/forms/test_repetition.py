"""Loops are found, in a stated number of times; texts that may repeat themselves never are.

Both as the demo model's tokenizer splits them and byte by byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_vlm.forms.repetition import (
    MAX_PERIOD,
    MAX_TIMES,
    MIN_BYTES,
    MIN_TIMES,
    NEVER,
    RepetitionGuard,
    times_enough,
)
from tests.forms.repetitive_texts import LONG, NUMBERED, legitimate, loops, numbered

TOKENIZER = Path(__file__).parents[2] / "models" / "demo" / "checkpoint" / "tokenizer.json"
LEGITIMATE = legitimate()
LOOPS = loops()
BEFORE = "Here it is:\n"
Split = tuple[list[int], Callable[[int], bytes]]


@cache
def tokenizer() -> tuple[Tokenizer, dict[str, int]]:
    """The demo model's, and the byte for each sign of its vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    signs = {chr(byte): byte for byte in shown}
    signs |= {chr(0x100 + place): byte for place, byte in enumerate(others)}
    return Tokenizer.from_file(str(TOKENIZER)), signs


def as_demo(text: str) -> Split:
    model, signs = tokenizer()
    ids = model.encode(text, add_special_tokens=False).ids

    def piece(token: int) -> bytes:
        return bytes(signs[sign] for sign in model.id_to_token(token) or "")

    return ids, piece


def as_bytes(text: str) -> Split:
    return list(text.encode()), lambda token: bytes([token])


SPLITS = (as_demo, as_bytes)


def stop(ids: Sequence[int], piece: Callable[[int], bytes]) -> tuple[int, int] | None:
    """Tokens that were taken when a loop was found, and how many of them are kept."""
    guard = RepetitionGuard(piece)
    for n_taken, token in enumerate(ids, 1):
        n_kept = guard.add([token])
        if n_kept is not None:
            return n_taken, n_kept
    return None


def test_there_are_enough_texts() -> None:
    assert len(set(LEGITIMATE.values())) >= 200
    assert len(set(LOOPS.values())) >= 60


@pytest.mark.parametrize("name", LEGITIMATE)
def test_a_text_that_may_repeat_itself_is_never_stopped(name: str) -> None:
    for split in SPLITS:
        assert stop(*split(f"{BEFORE}{LEGITIMATE[name]}\nThat is all.")) is None


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_found_in_the_stated_number_of_times(
    name: str, split: Callable[[str], Split]
) -> None:
    said = LOOPS[name]
    is_counted = "{n}" in said
    enough = times_enough((said.format(n=5) if is_counted else said).encode(), counted=is_counted)
    times = [said.format(n=n) if is_counted else said for n in range(1, enough + 4)]
    ids, piece = split(BEFORE + "".join(times))
    found = stop(ids, piece)
    assert found is not None
    taken, kept = (b"".join(map(piece, ids[:n])).decode("utf-8", "ignore") for n in found)
    # One more where a number has to go up twice before its step is known; one for where tokens end.
    n_times = next(n for n in count() if len(taken) <= len(BEFORE + "".join(times[:n])))
    assert enough - 1 <= n_times <= enough + 2
    assert (BEFORE + times[0]).startswith(kept.rstrip())
    missing = (BEFORE + times[0])[len(kept) :].strip()
    assert missing == ("the" if said == "the the " else "")


@pytest.mark.parametrize(
    ("said", "n_times"),
    [
        ("0", MIN_BYTES),
        ("0, ", 342),
        ("| | | |\n", 128),
        ("| Water | 1.00 |\n", MAX_TIMES),
        ("| Water bottle | Acme Corporation | In stock | 5.00 | " * 3 + "\n", 35),
        ("The image shows a man in a blue shirt. ", 29),
        ("- The image shows a man in a blue shirt\n", 47),
        (LONG, 6),
        (LONG + LONG.rstrip()[::-1], MIN_TIMES),
    ],
)
def test_how_many_times_are_enough(said: str, n_times: int) -> None:
    assert times_enough(said.encode()) == n_times


def test_counting_alone_is_never_a_loop() -> None:
    assert times_enough(b"12\n", counted=True) == NEVER
    for line, _ in NUMBERED[1:3]:
        assert stop(*as_bytes(numbered(line, 500))) is None


@pytest.mark.parametrize(("first", "step"), [(1, 1), (100, 5), (500, -1), (2000, 2)])
def test_numbers_may_go_up_or_down_by_any_step(first: int, step: int) -> None:
    said = "{n}. The image shows a man in a blue shirt.\n"
    ids, piece = as_bytes(numbered(said, 130, first, step))
    found = stop(ids, piece)
    assert found is not None
    assert bytes(ids[: found[1]]).decode().strip() == said.format(n=first).strip()


def test_a_table_of_other_numbers_is_none() -> None:
    rows = (f"{i * i % 97} bottles of mineral water from the spring\n" for i in range(300))
    for split in SPLITS:
        assert stop(*split("".join(rows))) is None


def test_no_character_is_cut() -> None:
    """The end of what was said before is that of each time, by the bytes but not by the letters."""
    said = "\N{CYRILLIC SMALL LETTER ER}\N{CYRILLIC SMALL LETTER A}, "
    text = "\N{LATIN CAPITAL LETTER A WITH GRAVE}" + said[1:] + said * 400
    ids, piece = as_bytes(text)
    found = stop(ids, piece)
    assert found is not None
    assert bytes(ids[: found[1]]).decode() == text[:5]


def test_several_tokens_at_once() -> None:
    ids, piece = as_bytes(LONG * 9)
    guard = RepetitionGuard(piece)
    assert guard.add(ids[: len(LONG)]) is None
    assert guard.add(ids[len(LONG) :]) == len(LONG)


@settings(deadline=None, max_examples=60)
@given(
    before=st.lists(st.integers(0, 99), max_size=60),
    said=st.lists(st.integers(0, 99), min_size=1, max_size=MAX_PERIOD),
    n_signs=st.integers(1, 8),
)
def test_a_tail_that_repeats_itself_is_always_found(
    before: list[int], said: list[int], n_signs: int
) -> None:
    def piece(token: int) -> bytes:
        return (chr(0x2500 + token) * n_signs).encode()

    enough = times_enough(b"".join(map(piece, said)))
    assert enough <= MIN_BYTES
    ids = [*before, *said * enough]
    found = stop(ids, piece)
    assert found is not None
    assert found[0] <= len(ids)
    assert found[1] <= len(before) + len(said)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 3), max_size=400), st.binary(min_size=1, max_size=40))
def test_a_text_without_a_repeated_run_is_never_stopped(few: list[int], word: bytes) -> None:
    """No part of it stands there three times in a row, however little differs between parts."""
    numbers = count()
    ids = [token for one in few for token in (one, 4, 4, 5, 6 + next(numbers))]
    assert stop(ids, lambda token: word * 4) is None


def test_a_token_costs_little() -> None:
    """Microseconds of an answer of 4,000 tokens: a decoder needs some ten thousands for one."""
    ids = [(i * i + i // 7) % 997 for i in range(4000)]
    guard = RepetitionGuard(lambda token: b" %d words" % token)
    started = time.process_time()
    assert guard.add(ids) is None
    assert (time.process_time() - started) / len(ids) < 1e-3
