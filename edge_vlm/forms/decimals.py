"""Decimal numbers within bounds as languages of their JSON texts."""

from __future__ import annotations

from fractions import Fraction

from edge_vlm.forms.languages import EMPTY, EPSILON, Languages


def between(
    languages: Languages,
    low: Fraction,
    high: Fraction,
    *,
    low_open: bool = False,
    high_open: bool = False,
    n_fraction: int = 0,
) -> int:
    """Numbers from ``low`` to ``high`` (an open bound itself is not one of them).

    They have no exponent and at most ``n_fraction`` digits after the point; 0 gives whole numbers.

    Raises:
        ValueError: a bound has more digits after the point than that.
    """
    found = []
    if high >= 0:
        nearest, is_open = (low, low_open) if low >= 0 else (Fraction(0), False)
        bounds = _Bounds(languages, nearest, high, is_open, high_open, n_fraction)
        found.append(bounds.language())
    if low < 0:
        nearest, is_open = (-high, high_open) if high < 0 else (Fraction(0), True)
        bounds = _Bounds(languages, nearest, -low, is_open, low_open, n_fraction)
        found.append(languages.sequence([languages.literal(b"-"), bounds.language()]))
    return languages.either(found)


class _Bounds:
    """Numbers from 0 on, digit by digit; a tight state is one where all digits so far were the
    bound's own.
    """

    def __init__(
        self,
        languages: Languages,
        low: Fraction,
        high: Fraction,
        low_open: bool,
        high_open: bool,
        n_fraction: int,
    ) -> None:
        self._languages = languages
        self._open = (low_open, high_open)
        self._is_empty = low > high
        self._n_fraction = n_fraction
        self._n_fixed = 0  # digits after the point that the bounds have
        while any((bound * 10**self._n_fixed).denominator > 1 for bound in (low, high)):
            self._n_fixed += 1
            if self._n_fixed > n_fraction:
                raise ValueError(f"a bound has more than {n_fraction} digits after the point")
        self._bounds = [str(int(bound * 10**self._n_fixed)) for bound in (low, high)]
        self._bounds = [digits.rjust(self._n_fixed + 1, "0") for digits in self._bounds]
        self._known: dict[tuple[int, int, tuple[bool, bool]], int] = {}

    def language(self) -> int:
        if self._is_empty:
            return EMPTY
        shortest, longest = (len(digits) - self._n_fixed for digits in self._bounds)
        found = []
        for n_digits in range(shortest, longest + 1):
            tight = (n_digits == shortest, n_digits == longest)
            found.append(self._digits(0, n_digits, tight))
        return self._languages.either(found)

    def _digits(self, position: int, n_whole: int, tight: tuple[bool, bool]) -> int:
        """What may follow ``position`` digits of a number with ``n_whole`` before the point."""
        languages = self._languages
        if position < n_whole:
            return self._next(position, n_whole, tight)
        parts = [EPSILON] if self._may_end(position, tight) else []
        if position == n_whole and self._n_fraction:
            point = languages.literal(b".")
            parts.append(languages.sequence([point, self._fraction(position, n_whole, tight)]))
        elif position > n_whole:
            parts.append(self._fraction(position, n_whole, tight))
        return languages.either(parts)

    def _fraction(self, position: int, n_whole: int, tight: tuple[bool, bool]) -> int:
        """At least one more digit after the point."""
        languages = self._languages
        n_left = self._n_fraction - (position - n_whole)
        if position - n_whole < self._n_fixed:
            return self._next(position, n_whole, tight)
        if tight[1] or n_left == 0:
            return EMPTY
        digit = languages.one_of(_mask(0, 9))
        if tight[0] and self._open[0]:
            zeros = languages.repeat(digit, 0, n_left - 1)
            return languages.sequence([zeros, languages.one_of(_mask(1, 9))])
        return languages.repeat(digit, 1, n_left)

    def _next(self, position: int, n_whole: int, tight: tuple[bool, bool]) -> int:
        languages = self._languages
        key = (position, n_whole, tight)
        if key in self._known:
            return self._known[key]
        low, high = (
            int(digits[position]) if is_tight else default
            for digits, is_tight, default in zip(
                self._bounds, tight, (int(position == 0 and n_whole > 1), 9), strict=True
            )
        )
        found = []
        for first, last in {(low, low), (low + 1, high - 1), (high, high)}:
            if low <= first <= last <= high:
                then = (tight[0] and first == low, tight[1] and last == high)
                rest = self._digits(position + 1, n_whole, then)
                found.append(languages.sequence([languages.one_of(_mask(first, last)), rest]))
        self._known[key] = languages.either(found)
        return self._known[key]

    def _may_end(self, position: int, tight: tuple[bool, bool]) -> bool:
        for is_tight, is_open, digits, is_low in zip(
            tight, self._open, self._bounds, (True, False), strict=True
        ):
            on_bound = is_tight and not digits[position:].strip("0")
            if on_bound and is_open:
                return False
            if is_low and is_tight and not on_bound:
                return False
        return True


def _mask(first: int, last: int) -> int:
    return sum(1 << (0x30 + digit) for digit in range(first, last + 1))
