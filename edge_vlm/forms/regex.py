"""Regular expressions of Python's ``re`` as languages: what ``re.fullmatch`` accepts.

Python's own parser reads the pattern, so the syntax is Python's. What is not regular (lookaround,
backreferences) or has no meaning in a text that is generated is refused. Where a construct means
more than is worth building (case folding outside ASCII), a part of it is allowed: every text of
the language is a full match.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from edge_vlm.errors import PromptError
from edge_vlm.forms.languages import EPSILON, Languages, Ranges, complement, union

if sys.version_info >= (3, 11):
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_parse

MAX_PATTERN_CHARS = 5000
_REFUSED = {
    "ASSERT": "lookahead and lookbehind are not supported",
    "ASSERT_NOT": "lookahead and lookbehind are not supported",
    "GROUPREF": "backreferences are not supported",
    "GROUPREF_EXISTS": "backreferences are not supported",
    "ATOMIC_GROUP": "atomic groups are not supported",
    "POSSESSIVE_REPEAT": "possessive repetition is not supported",
}
_STARTS = ("AT_BEGINNING", "AT_BEGINNING_STRING")
_ENDS = ("AT_END", "AT_END_STRING")


class RegexCompiler:
    """Builds one pattern's language.

    Args:
        languages: where to build it.
        encode: a character's language; by default its UTF-8.
        flags: flags of ``re``, such as ``re.ASCII``.
    """

    def __init__(
        self,
        languages: Languages,
        encode: Callable[[Ranges], int] | None = None,
        flags: int = 0,
    ) -> None:
        self._languages = languages
        self._encode = encode or languages.characters
        self._flags = flags

    def compile(self, pattern: str, *, search: bool = False) -> int:
        """The language of ``re.fullmatch``, or of ``re.search`` (as in JSON Schema).

        Raises:
            PromptError: the pattern is not valid, not regular or too large.
        """
        if len(pattern) > MAX_PATTERN_CHARS:
            raise PromptError(f"has more than {MAX_PATTERN_CHARS} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of future meanings of [[ and the like
                parsed = sre_parse.parse(pattern, self._flags)
        except re.error as error:
            raise PromptError(f"is not a valid regular expression ({error})") from error
        except (OverflowError, RecursionError) as error:
            raise PromptError("is too deep or counts too far") from error
        items: list[Any] = list(parsed)  # type: ignore[call-overload]
        flags = parsed.state.flags
        if not search:
            return self._sequence(items, flags, True, True)
        free = self._languages.repeat(self._encode([(0, 0x10FFFF)]), 0, None)
        found = []
        for branch, starts, ends in _branches(items, False, False):
            middle = self._sequence(branch, flags, False, False)
            around = [EPSILON if starts else free, middle, EPSILON if ends else free]
            found.append(self._languages.sequence(around))
        return self._languages.either(found)

    def _sequence(self, items: Sequence[Any], flags: int, first: bool, last: bool) -> int:
        """Items in a row; ``first`` and ``last`` say that nothing is before or after them."""
        parts = []
        for index, (op, data) in enumerate(items):
            begins = first and all(str(other) == "AT" for other, _ in items[:index])
            closes = last and all(str(other) == "AT" for other, _ in items[index + 1 :])
            parts.append(self._item(op, data, flags, begins, closes))
        return self._languages.sequence(parts)

    def _item(self, op: Any, data: Any, flags: int, first: bool, last: bool) -> int:
        name = str(op)
        if name in _REFUSED:
            raise PromptError(_REFUSED[name])
        if name == "SUBPATTERN":
            _, added, removed, items = data
            return self._sequence(items, (flags | added) & ~removed, first, last)
        if name == "BRANCH":
            branches = (self._sequence(items, flags, first, last) for items in data[1])
            return self._languages.either(branches)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, items = data
            part = self._sequence(items, flags, False, False)
            endless = high == sre_parse.MAXREPEAT
            return self._languages.repeat(part, int(low), None if endless else int(high))
        if name == "AT":
            if (first and str(data) in _STARTS) or (last and str(data) in _ENDS):
                return EPSILON
            raise PromptError("anchors are supported at the beginning and the end only")
        return self._encode(_characters(op, data, flags))


def _branches(items: list[Any], starts: bool, ends: bool) -> Iterator[tuple[list[Any], bool, bool]]:
    """The alternatives of a whole pattern, and whether each is anchored at its ends."""
    while items and str(items[0][0]) == "AT" and str(items[0][1]) in _STARTS:
        items, starts = items[1:], True
    while items and str(items[-1][0]) == "AT" and str(items[-1][1]) in _ENDS:
        items, ends = items[:-1], True
    if len(items) == 1 and str(items[0][0]) == "BRANCH":
        for branch in items[0][1][1]:
            yield from _branches(list(branch), starts, ends)
    else:
        yield items, starts, ends


def _characters(op: Any, data: Any, flags: int) -> list[tuple[int, int]]:
    name = str(op)
    if name == "ANY":
        return [(0, 0x10FFFF)] if flags & re.DOTALL else complement([(10, 10)])
    if name == "LITERAL":
        return _both_cases([(data, data)], flags)
    if name == "NOT_LITERAL":
        return complement(_both_cases([(data, data)], flags))
    if name == "IN":
        ranges: list[tuple[int, int]] = []
        negated = False
        for kind, value in data:
            if str(kind) == "NEGATE":
                negated = True
            elif str(kind) == "LITERAL":
                ranges.append((value, value))
            elif str(kind) == "RANGE":
                ranges.append(value)
            else:
                ranges += _category(str(value), bool(flags & re.ASCII))
        ranges = union(_both_cases(ranges, flags))
        return complement(ranges) if negated else ranges
    raise PromptError(f"{name.lower()} is not supported")


def _both_cases(ranges: list[tuple[int, int]], flags: int) -> list[tuple[int, int]]:
    if not flags & re.IGNORECASE:
        return ranges
    more = []
    for low, high in ranges:
        for first, last, shift in ((0x41, 0x5A, 32), (0x61, 0x7A, -32)):
            if low <= last and high >= first:
                more.append((max(low, first) + shift, min(high, last) + shift))
        if low == high and low > 0x7F:
            character = chr(low)
            for other in {character.lower(), character.upper()}:
                if len(other) == 1 and re.fullmatch(re.escape(character), other, re.IGNORECASE):
                    more.append((ord(other), ord(other)))
    return [*ranges, *more]


@functools.cache
def _category(name: str, ascii_only: bool) -> tuple[tuple[int, int], ...]:
    """The characters of a class as ``re`` defines them."""
    _, _, kind = name.rpartition("_")
    if name.startswith("CATEGORY_NOT"):
        return tuple(complement(_category(f"CATEGORY_{kind}", ascii_only)))
    match = re.compile({"DIGIT": r"\d+", "SPACE": r"\s+", "WORD": r"\w+"}[kind])
    last = 0x7F if ascii_only else 0x10FFFF
    text = "".join(map(chr, range(last + 1)))
    return tuple((m.start(), m.end() - 1) for m in match.finditer(text))
