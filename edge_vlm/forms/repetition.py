"""Answers that say the same over and over: when that has gone on too long to be meant.

Two sequences are watched, each for all periods up to ``MAX_PERIOD``: the token ids, and the text
with each number as one symbol, in which "1. the same 2. the same 3. the same" repeats itself too.
How much is too much is counted in bytes of text, so that it does not depend on the tokenizer.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Sequence
from math import ceil

import numpy as np

MAX_PERIOD = 512  # tokens, or symbols
# A text that stands there fewer times, or in fewer bytes, is never a loop: a refrain, a ruled line.
MIN_TIMES = 5
MIN_BYTES = 1024
# So often, or so much, is always one: more rows than the 40 that a page has.
MAX_TIMES = 64
MAX_BYTES = 5600
# Between them it is the sooner the more is said each time, outside tables: this many different
# pairs of neighbouring letters, added up over all times. A sentence of 20 words has some 60.
MAX_PAIRS = 512
MAX_PAIRS_OF_LINES = 832  # a sheet of 30 equal labels is not one
# Numbered items: legitimate lists of equal ones are long, and counting may go on forever.
COUNTED = 2  # times as many as of unnumbered ones, and no fewer than of rows
MIN_COUNTED_PAIRS = 12
NEVER = 1 << 40
_MAX_DIGITS = 15  # of a number that is counted with; second differences fit 64 bits
# Cells, fields, attributes and indented code.
_ROWS = re.compile(r"[|\t&{}]|  [^\n]*\n|</t|[,;][^\n]*[,;][^\n]*\n")
_FRAGMENTS = re.compile(rb"[0-9]+|[^0-9]+")
_NUMBER = -1  # the symbol


class RepetitionGuard:
    """Looks for a loop in an answer, token by token.

    Args:
        piece: the bytes that a token stands for.
    """

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._pieces: list[bytes] = []
        self._tokens = _Runs()
        self._counted = _CountedText()

    def add(self, ids: Sequence[int]) -> int | None:
        """Take the next tokens.

        Returns:
            How many of all tokens so far come before the first repeat, if they are now a loop: one
            period stays, and whole characters.
        """
        for token in ids:
            piece = self._piece(token)
            self._pieces.append(piece)
            n_kept = self._exact(token)
            if n_kept is None:
                n_kept = self._counted.add(piece)
            if n_kept is not None:
                return self._whole_characters(n_kept)
        return None

    def _exact(self, token: int) -> int | None:
        self._tokens.add(token)
        for period in self._tokens.due():
            said = b"".join(self._pieces[-period:])
            if self._tokens.is_loop(period, times_enough(said)):
                return self._first_repeat(self._tokens.length(period), len(said))
        return None

    def _first_repeat(self, n_tokens: int, period: int) -> int:
        """Its token, of the last ``n_tokens`` or before them, where the text is in other tokens."""
        n_kept = len(self._pieces) - n_tokens
        text = b"".join(self._pieces)
        first = end = sum(map(len, self._pieces[:n_kept]))
        while first > period and text[first - 1] == text[first - 1 - period]:
            first -= 1
        while end > first:
            n_kept -= 1
            end -= len(self._pieces[n_kept])
        return n_kept + 1 if text[end:first].strip() else n_kept

    def _whole_characters(self, n_kept: int) -> int:
        """``n_kept``, or as many more tokens as end the character that it would cut."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for piece in self._pieces[:n_kept]:
            utf8.decode(piece)
        while n_kept < len(self._pieces) and utf8.getstate()[0]:
            utf8.decode(self._pieces[n_kept])
            n_kept += 1
        return n_kept


def times_enough(said: bytes, *, counted: bool = False) -> int:
    """How many times a text, its first time included, makes a loop; ``NEVER`` if none do.

    Args:
        said: UTF-8, from any place in the loop to the same place.
        counted: in which numbers go up each time.
    """
    n_bytes = max(len(said), 1)
    text = said.decode("utf-8", "ignore")
    around = text + text[: 1 + text.find("\n")] + text[:1]
    n_pairs = _letter_pairs(around)
    least = max(MIN_TIMES, ceil(MIN_BYTES / n_bytes))
    n_times = n_rows = max(least, ceil(min(MAX_TIMES, MAX_BYTES / n_bytes)))
    if n_pairs and not _ROWS.search(around):
        n_said = MAX_PAIRS_OF_LINES if "\n" in text else MAX_PAIRS
        n_times = max(least, min(n_rows, ceil(n_said / n_pairs)))
    if not counted:
        return n_times
    return max(n_rows, COUNTED * n_times) if n_pairs >= MIN_COUNTED_PAIRS else NEVER


def _letter_pairs(text: str) -> int:
    """Different pairs of neighbouring letters, in any script."""
    found = set()
    before = ""
    for character in text.lower():
        is_letter = character.isalpha() or unicodedata.category(character).startswith("M")
        if is_letter and before:
            found.add(before + character)
        before = character if is_letter else ""
    return len(found)


class _CountedText:
    """Text whose numbers stay or go up, or down, by the same from one period to the next."""

    def __init__(self) -> None:
        self._runs = _Runs()
        self._codes: dict[bytes, int] = {}
        self._symbols: list[int] = []
        self._texts: list[bytes] = []
        self._starts: list[int] = []  # the token in which each symbol begins
        self._number = b""  # that has not ended yet
        self._number_start = 0
        self._has_number = False
        self._n_tokens = 0

    def add(self, piece: bytes) -> int | None:
        """Take the next token; returns how many come before the first repeat, in a loop."""
        n_kept = None
        for text in _FRAGMENTS.findall(piece):
            if text[:1].isdigit():
                if not self._number:
                    self._number_start = self._n_tokens
                self._number += text
                continue
            if self._number:
                n_kept = n_kept or self._number_ends()
            code = self._codes.setdefault(text, len(self._codes))
            n_kept = n_kept or self._append(code, 0, text, self._n_tokens)
        self._n_tokens += 1
        return n_kept

    def _number_ends(self) -> int | None:
        text, self._number = self._number, b""
        if len(text) > _MAX_DIGITS:
            code = self._codes.setdefault(text, len(self._codes))
            return self._append(code, 0, text, self._number_start)
        return self._append(_NUMBER, int(text), text, self._number_start)

    def _append(self, symbol: int, value: int, text: bytes, start: int) -> int | None:
        self._symbols.append(symbol)
        self._texts.append(text)
        self._starts.append(start)
        self._has_number |= symbol == _NUMBER
        if not self._has_number:
            return None
        self._runs.add(symbol, value)
        for period in self._runs.due():
            is_counted = _NUMBER in self._symbols[-period:]
            said = b"".join(self._texts[-period:])
            enough = times_enough(said, counted=True) if is_counted else NEVER
            if self._runs.is_loop(period, enough):
                return self._starts[self._first_repeat(period)]
        return None

    def _first_repeat(self, period: int) -> int:
        """Its symbol. A step of a number is known after two periods: the second repeats too."""
        first = len(self._symbols) - self._runs.length(period)
        least = max(period, first - period)
        while first > least and self._is_same(first - 1, first - 1 - period):
            first -= 1
        return first

    def _is_same(self, one: int, other: int) -> bool:
        """But for numbers, and the space that a token has behind a word and not on a line."""
        texts = self._texts
        is_number = self._symbols[one] == self._symbols[other] == _NUMBER
        return is_number or texts[one].strip() == texts[other].strip()


class _Runs:
    """For each period, how many of the last symbols are those of a period before.

    A symbol may have a value, which has to change by the same from each period to the next.
    """

    def __init__(self) -> None:
        self._least = (MIN_TIMES - 1) * np.arange(1, MAX_PERIOD + 1)
        self._n = 0
        self._began = np.zeros(MAX_PERIOD, np.int64)  # of each period's run: its first symbol
        self._due = self._least.copy()  # how many symbols there are when the run is looked at
        # What was added, the last first, from ``_at`` on; behind it what could be no symbol.
        self._symbols = np.full(8 * MAX_PERIOD, -2, np.int64)
        self._values = np.zeros(8 * MAX_PERIOD, np.int64)
        self._at = 6 * MAX_PERIOD
        self._has_values = False

    def add(self, symbol: int, value: int = 0) -> None:
        """One more."""
        if not self._at:
            self._at = 6 * MAX_PERIOD
            for kept in (self._symbols, self._values):
                kept[self._at :] = kept[: 2 * MAX_PERIOD].copy()
        before = self._at
        self._at -= 1
        self._n += 1
        self._symbols[self._at], self._values[self._at] = symbol, value
        other = self._symbols[before : before + MAX_PERIOD] != symbol
        if value or self._has_values:
            self._has_values = True
            once = self._values[before : before + MAX_PERIOD]
            twice = self._values[before + 1 : before + 2 * MAX_PERIOD : 2]
            other |= once + once - twice != value
        np.putmask(self._began, other, self._n)
        np.putmask(self._due, other, self._least + self._n)

    def length(self, period: int) -> int:
        """Of the run with that period: the symbols after its first time."""
        return self._n - int(self._began[period - 1])

    def due(self) -> list[int]:
        """Periods whose runs are now ``MIN_TIMES`` long, or as long as ``is_loop`` was told."""
        if self._due.min() > self._n:
            return []
        return [index + 1 for index in (self._due <= self._n).nonzero()[0].tolist()]

    def is_loop(self, period: int, n_times: int) -> bool:
        """Whether the run is ``n_times`` long; if not, it is due again when it is."""
        due = int(self._began[period - 1]) + (n_times - 1) * period
        self._due[period - 1] = due
        return due <= self._n
