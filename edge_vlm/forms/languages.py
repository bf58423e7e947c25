"""Regular languages over bytes: expressions, and lazily the automaton of their derivatives.

An expression is a number in a ``Languages`` table; equal ones share a number, and none but
``EMPTY`` stands for the empty language, so whatever has begun can be completed. The state after a
byte is the expression's derivative (Brzozowski 1964), made when it is first needed: counted
repetitions and nested objects cost what is visited of them, not what could be.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import PromptError

Int32 = npt.NDArray[np.int32]
Ranges = Sequence[tuple[int, int]]  # code points, inclusive, ascending and disjoint

EMPTY = 0  # nothing matches
EPSILON = 1  # the empty text alone
_SET, _CAT, _ALT, _REPEAT = range(4)
_MAX_NODES = 400_000
_MAX_ROWS = 60_000  # 1 KiB each
_MAX_DEPTH = 250  # well below what Python's stack takes
_UTF8_ENDS = (0x7F, 0x7FF, 0xFFFF)  # last code points of one, two and three bytes
_SURROGATES = (0xD800, 0xDFFF)


class Languages:
    """A table of expressions. Build while holding ``lock`` where others may read."""

    def __init__(self) -> None:
        self._nodes: list[tuple[int, ...]] = [(-1,), (-2,)]
        self._known: dict[tuple[int, ...], int] = {}
        self._nullable = [False, True]
        self._shortest = [0, 0]  # bytes of the shortest text
        self._depth = [0, 0]
        self._rows: dict[int, Int32] = {
            EMPTY: np.zeros(256, np.int32),
            EPSILON: np.zeros(256, np.int32),
        }
        self.lock = threading.RLock()  # for building while others read

    def one_of(self, mask: int) -> int:
        """One byte: bit b of ``mask`` is set for byte b."""
        return self._node((_SET, mask), False, 1, 1) if mask else EMPTY

    def literal(self, data: bytes) -> int:
        """These bytes."""
        return self.sequence([self.one_of(1 << byte) for byte in data])

    def sequence(self, parts: Sequence[int]) -> int:
        """One after another."""
        result = EPSILON
        for part in reversed(parts):
            result = self._then(part, result)
        return result

    def either(self, parts: Iterable[int]) -> int:
        """Any of them."""
        mask = 0
        members: set[int] = set()
        todo = list(parts)
        while todo:
            part = todo.pop()
            node = self._nodes[part]
            if node[0] == _ALT:
                todo += node[1:]
            elif node[0] == _SET:
                mask |= node[1]
            elif part != EMPTY:
                members.add(part)
        if mask:
            members.add(self.one_of(mask))
        if EPSILON in members and any(self._nullable[m] for m in members if m != EPSILON):
            members.remove(EPSILON)
        if len(members) < 2:
            return members.pop() if members else EMPTY
        ordered = sorted(members)
        return self._node(
            (_ALT, *ordered),
            any(self._nullable[m] for m in ordered),
            min(self._shortest[m] for m in ordered),
            1 + max(self._depth[m] for m in ordered),
        )

    def optional(self, part: int) -> int:
        """The part or nothing."""
        return self.either([EPSILON, part])

    def repeat(self, part: int, low: int, high: int | None) -> int:
        """``low`` to ``high`` times; None for without end."""
        if part == EMPTY:
            return EPSILON if low == 0 else EMPTY
        if part == EPSILON or high == 0:
            return EPSILON
        if low == high == 1:
            return part
        if self._nullable[part]:
            low = 0
        return self._node(
            (_REPEAT, part, low, -1 if high is None else high),
            low == 0,
            low * self._shortest[part],
            1 + self._depth[part],
        )

    def characters(self, ranges: Ranges) -> int:
        """One character in UTF-8; surrogates, which UTF-8 does not have, are left out."""
        by_tail: dict[int, int] = {}
        for low, high in ranges:
            for sets in _utf8_sets(low, high):
                tail = self.sequence([self.one_of(mask) for mask in sets[1:]])
                by_tail[tail] = by_tail.get(tail, 0) | sets[0]
        return self.either(self._then(self.one_of(lead), tail) for tail, lead in by_tail.items())

    def matches_empty(self, node: int) -> bool:
        """Whether the text may end here."""
        return self._nullable[node]

    def is_complete(self, node: int) -> bool:
        """Whether the text must end here."""
        return node == EPSILON

    def shortest_length(self, node: int) -> int:
        """Bytes of the shortest text; 0 for ``EMPTY``, which has none."""
        return self._shortest[node]

    def shortest(self, node: int) -> bytes:
        """The shortest text, the first in byte order where several sets of bytes would do."""
        parts: list[bytes] = []
        todo = [node]
        while todo:
            kind, *data = self._nodes[todo.pop()]
            if kind == _SET:
                parts.append(bytes([(data[0] & -data[0]).bit_length() - 1]))
            elif kind == _CAT:
                todo += reversed(data)
            elif kind == _ALT:
                todo.append(min(data, key=lambda member: self._shortest[member]))
            elif kind == _REPEAT:
                parts.append(self.shortest(data[0]) * data[1])
        return b"".join(parts)

    def row(self, node: int) -> Int32:
        """(256,) int32: the expression that remains after each byte, ``EMPTY`` where none may come.

        Raises:
            PromptError: the language needs too many states.
        """
        found = self._rows.get(node)
        if found is None:
            with self.lock:
                found = self._derive(node)
        return found

    def full_match(self, node: int, data: bytes) -> bool:
        """Whether the expression matches all of ``data``."""
        for byte in data:
            node = int(self.row(node)[byte])
        return self._nullable[node]

    def _derive(self, node: int) -> Int32:
        if node in self._rows:
            return self._rows[node]
        if len(self._rows) >= _MAX_ROWS:
            raise PromptError("the form of the answer is too complex")
        kind, *data = self._nodes[node]
        if kind == _SET:
            bits = np.frombuffer(data[0].to_bytes(32, "little"), np.uint8)
            row = np.unpackbits(bits, bitorder="little").astype(np.int32)  # EPSILON is 1
        elif kind == _CAT:
            head, tail = data
            row = self._map(self._derive(head), tail)
            if self._nullable[head]:
                row = self._merge([row, self._derive(tail)])
        elif kind == _ALT:
            row = self._merge([self._derive(member) for member in data])
        else:
            part, low, high = data
            rest = self.repeat(part, max(low - 1, 0), None if high < 0 else high - 1)
            row = self._map(self._derive(part), rest)
        self._rows[node] = row
        return row

    def _map(self, row: Int32, tail: int) -> Int32:
        values, where = np.unique(row, return_inverse=True)
        after = [self._then(int(value), tail) for value in values]
        return np.array(after, np.int32)[where.reshape(256)]

    def _merge(self, rows: list[Int32]) -> Int32:
        columns = np.stack(rows, axis=1)
        merged: dict[bytes, int] = {}
        row = np.empty(256, np.int32)
        for byte, column in enumerate(columns):
            key = column.tobytes()
            if key not in merged:
                merged[key] = self.either(map(int, column[column != EMPTY]))
            row[byte] = merged[key]
        return row

    def _then(self, head: int, tail: int) -> int:
        """``head`` then ``tail``, nested to the right so that equal sequences are one."""
        if EMPTY in (head, tail):
            return EMPTY
        if head == EPSILON:
            return tail
        if tail == EPSILON:
            return head
        spine = []
        while self._nodes[head][0] == _CAT:
            _, first, head = self._nodes[head]
            spine.append(first)
        spine.append(head)
        for part in reversed(spine):
            nullable = self._nullable[part]
            tail = self._node(
                (_CAT, part, tail),
                nullable and self._nullable[tail],
                self._shortest[part] + self._shortest[tail],
                1 + max(self._depth[part], self._depth[tail] if nullable else 0),
            )
        return tail

    def _node(self, key: tuple[int, ...], nullable: bool, shortest: int, depth: int) -> int:
        found = self._known.get(key)
        if found is not None:
            return found
        if len(self._nodes) >= _MAX_NODES or depth > _MAX_DEPTH:
            raise PromptError("the form of the answer is too complex")
        self._nodes.append(key)
        self._nullable.append(nullable)
        self._shortest.append(shortest)
        self._depth.append(depth)
        self._known[key] = len(self._nodes) - 1
        return len(self._nodes) - 1


def complement(ranges: Ranges) -> list[tuple[int, int]]:
    """All other code points, surrogates among neither."""
    result = []
    start = 0
    for low, high in union([*ranges, _SURROGATES]):
        if low > start:
            result.append((start, low - 1))
        start = high + 1
    if start <= 0x10FFFF:
        result.append((start, 0x10FFFF))
    return result


def union(ranges: Ranges) -> list[tuple[int, int]]:
    """The same code points in ascending, disjoint ranges."""
    result: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return result


def without(ranges: Ranges, removed: Ranges) -> list[tuple[int, int]]:
    """``ranges`` less ``removed``, and less surrogates."""
    return complement([*complement(ranges), *removed])


def _utf8_sets(low: int, high: int) -> list[list[int]]:
    """Sequences of sets of bytes, as masks, that together encode the code points of a range."""
    if low <= _SURROGATES[1] and high >= _SURROGATES[0]:
        parts = [(low, _SURROGATES[0] - 1), (_SURROGATES[1] + 1, high)]
        return [sets for part in parts if part[0] <= part[1] for sets in _utf8_sets(*part)]
    for end in _UTF8_ENDS:
        if low <= end < high:
            return [*_utf8_sets(low, end), *_utf8_sets(end + 1, high)]
    if high < 0x80:
        return [[_bits(low, high)]]
    for n_bits in (6, 12, 18):  # split until all but the first differing byte take every value
        inside = (1 << n_bits) - 1
        if low >> n_bits != high >> n_bits:
            if low & inside:
                middle = (low | inside) + 1
                return [*_utf8_sets(low, middle - 1), *_utf8_sets(middle, high)]
            if high & inside != inside:
                middle = high & ~inside
                return [*_utf8_sets(low, middle - 1), *_utf8_sets(middle, high)]
    return [[_bits(*ends) for ends in zip(chr(low).encode(), chr(high).encode(), strict=True)]]


def _bits(low: int, high: int) -> int:
    return (1 << (high + 1)) - (1 << low)
