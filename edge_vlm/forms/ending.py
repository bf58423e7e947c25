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
_SECONDS = 1.0  # of this thread, for all attempts
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
        options = _in_order(walk.compute_bitmask()[:32])
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
    stop_at = time.thread_time() + _SECONDS
    for attempt in range(_ATTEMPTS):
        walk, text = state.deep_copy(), bytearray()
        taken: Counter[tuple[bytes, int]] = Counter()
        closed: set[bytes] = set()
        patience = 8 if attempt else 1  # times
        dice = random.Random(attempt)  # noqa: S311 - no secret
        while not walk.is_accepting() and len(text) <= limit and time.thread_time() < stop_at:
            step = _hint(walk, hints, closed)
            if not step:
                mask = walk.compute_bitmask()[:32]
                options = _in_order(mask)
                if not options:
                    break
                if attempt < 2:
                    byte = min(options, key=lambda option: taken[mask, option] // patience)
                elif len(options) <= 4:
                    byte = dice.choice(options)
                else:
                    byte = next((one for one in options if dice.random() < 0.5), options[-1])
                taken[mask, byte] += 1
                step = bytes([byte])
            text += step
            if not walk.consume_tokens([*step]):
                break
        if len(text) <= limit and walk.is_accepting():
            yield bytes(text)


def _hint(walk: LLMatcher, hints: Sequence[bytes], closed: set[bytes]) -> bytes:
    """A hint after which all may end, or a string, which each closes once: `.*` takes them all."""
    for hint in hints:
        if ends(walk, hint):
            return hint
    for hint in hints:
        if hint not in closed and walk.validate_tokens([*hint, ord('"')]) == len(hint) + 1:
            closed.add(hint)
            return hint + b'"'
    return b""


@lru_cache(maxsize=4096)
def _in_order(mask: bytes) -> list[int]:
    """The bytes of a mask of 256 bits, the one that looks nearest to an end first."""
    found = [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]
    first = _FIRST_OF_FEW if len(found) <= _MANY else _FIRST_OF_MANY
    return sorted(found, key=lambda byte: (first.find(byte) % 256, byte))
