"""How a text of a form can be ended, byte by byte."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from llguidance import LLMatcher

from edge_vlm.errors import PromptError
from edge_vlm.forms.vocabulary import byte_tokenizer, reason

MAX_ENDING_BYTES = 1 << 15
_ATTEMPTS = 10
_STEPS = 40_000  # of all attempts: half a second
_SECONDS = 1.0  # of this thread, where llguidance takes milliseconds for each of them
_MANY = 20  # options that are a string's rather than a structure's
# Where little may come, as behind a value: what ends it, or else is short. In a string: its end.
_FIRST_OF_FEW = b'}]",:1234567890ntf[{'
_FIRST_OF_MANY = b'" abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'


def ends(state: LLMatcher, text: bytes) -> bool:
    """Whether the whole may end after this text."""
    return state.validate_tokens([*text, byte_tokenizer().eos_token]) == len(text) + 1


def forces(state: LLMatcher, n: int) -> bool:
    """Whether the next ``n`` bytes leave no choice.

    Raises:
        PromptError: the form needs too many states.
    """
    walk = state.deep_copy()
    for _ in range(n):
        options = in_order(walk.compute_bitmask()[:32])
        if walk.is_accepting() or len(options) != 1:
            return False
        if not walk.consume_token(options[0]):
            raise PromptError(f"the form of the answer is too complex ({reason(walk)})")
    return True


def endings(state: LLMatcher, limit: int, hints: Sequence[bytes]) -> Iterator[bytes]:
    """Short texts of at most ``limit`` bytes after which the whole may end, as they are found.

    Where several bytes may come the one is taken that looks nearest to an end, unless it was taken
    there more often than others already; later attempts leave more to chance.

    ``hints`` are what may be needed to the letter; they are tried where there is a choice.
    """
    n_left, stop_at = _STEPS, time.thread_time() + _SECONDS
    tokens = [([*hint], hint) for hint in hints]
    for attempt in range(_ATTEMPTS):
        walk, text = state.deep_copy(), bytearray()
        seen: Counter[bytes] = Counter()
        closed: set[bytes] = set()
        patience = 8 if attempt else 1  # times
        dice = random.Random(attempt)  # noqa: S311 - no secret
        while not walk.is_accepting() and len(text) <= limit:
            if n_left <= 0 or time.thread_time() > stop_at:
                return
            mask = walk.compute_bitmask()[:32]
            options = in_order(mask)
            if not options:
                break
            step = _hint(walk, mask, tokens, closed)
            if not step:
                if attempt < 2:  # each in turn
                    byte = options[seen[mask] // patience % len(options)]
                    seen[mask] += 1
                elif len(options) <= 4:
                    byte = dice.choice(options)
                else:
                    byte = next((one for one in options if dice.random() < 0.5), options[-1])
                step = [byte]
            text += bytes(step)
            n_left -= 1
            if not walk.consume_tokens(step):
                break
        if len(text) <= limit and walk.is_accepting():
            yield bytes(text)


def _hint(
    walk: LLMatcher, mask: bytes, hints: Sequence[tuple[list[int], bytes]], closed: set[bytes]
) -> list[int]:
    """A hint after which all may end, or a string, which each closes once: `.*` takes them all."""
    possible = [(ids, hint) for ids, hint in hints if mask[ids[0] >> 3] >> (ids[0] & 7) & 1]
    for ids, _ in possible:
        if walk.validate_tokens([*ids, byte_tokenizer().eos_token]) == len(ids) + 1:
            return ids
    for ids, hint in possible:
        if hint not in closed and walk.validate_tokens([*ids, ord('"')]) == len(ids) + 1:
            closed.add(hint)
            return [*ids, ord('"')]
    return []


@lru_cache(maxsize=4096)
def in_order(mask: bytes) -> list[int]:
    """The bytes of a mask of 256 bits, the one that looks nearest to an end first."""
    found = [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]
    first = _FIRST_OF_FEW if len(found) <= _MANY else _FIRST_OF_MANY
    return sorted(found, key=lambda byte: (first.find(byte) % 256, byte))
