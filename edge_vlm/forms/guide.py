"""From a language over bytes to the tokens that may come next, and to an end within the budget."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import DecoderError, PromptError
from edge_vlm.forms.languages import EMPTY, Languages

Int32 = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
_KEPT = 64  # states whose tokens are remembered, 4 bytes a token each


class Vocabulary:
    """The tokens' bytes as a trie, level by level.

    Args:
        pieces: the bytes of each id; empty for ids that stand for no text.

    Raises:
        DecoderError: some byte has no token of its own.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.n_ids = len(pieces)
        self.longest = max(map(len, pieces))
        self._ids = {piece: i for i, piece in reversed(list(enumerate(pieces))) if piece}
        if any(bytes([byte]) not in self._ids for byte in range(256)):
            raise DecoderError("the model has no token for every byte")
        order = np.array(sorted((i for i, p in enumerate(pieces) if p), key=pieces.__getitem__))
        lengths = np.array([len(pieces[i]) for i in order])
        flat = np.frombuffer(b"".join(pieces[i] for i in order), np.uint8)
        starts = np.cumsum(lengths) - lengths
        self._levels: list[tuple[Int32, npt.NDArray[np.uint8]]] = []  # parent and byte of nodes
        self._node_of = np.full(self.n_ids, -1, np.int32)  # where each token ends
        reached = np.zeros(len(order), np.int32)  # the node of each token's prefix; 0 is the root
        self._n_nodes = 1
        for level in range(self.longest):
            alive = np.flatnonzero(lengths > level)
            parents, data = reached[alive], flat[starts[alive] + level]
            is_new = np.ones(len(alive), np.bool_)
            is_new[1:] = (parents[1:] != parents[:-1]) | (data[1:] != data[:-1])
            reached[alive] = self._n_nodes + np.cumsum(is_new) - 1
            self._levels.append((parents[is_new], data[is_new]))
            self._n_nodes += int(is_new.sum())
        self._node_of[order] = reached
        self._lock = threading.Lock()
        self._known: weakref.WeakKeyDictionary[Languages, OrderedDict[int, Int32]]
        self._known = weakref.WeakKeyDictionary()

    def after(self, languages: Languages, state: int) -> Int32:
        """(n_ids,) int32: the expression that remains after each token, ``EMPTY`` where it may not
        come.
        """
        with self._lock:
            known = self._known.setdefault(languages, OrderedDict())
            if state in known:
                known.move_to_end(state)
                return known[state]
            found = known[state] = self._walk(languages, state)
            if len(known) > _KEPT:
                known.popitem(last=False)
            return found

    def spell(self, text: bytes) -> list[int]:
        """Ids of tokens that together are these bytes, each as long as it can be."""
        ids = []
        position = 0
        while position < len(text):
            length = min(self.longest, len(text) - position)
            while text[position : position + length] not in self._ids:
                length -= 1
            ids.append(self._ids[text[position : position + length]])
            position += length
        return ids

    def _walk(self, languages: Languages, state: int) -> Int32:
        states = np.zeros(self._n_nodes, np.int32)
        states[0] = state
        first = 1
        for parents, data in self._levels:
            before = states[parents]
            alive = np.flatnonzero(before)
            if not len(alive):
                break
            values, where = np.unique(before[alive], return_inverse=True)
            table = np.stack([languages.row(int(value)) for value in values])
            states[first + alive] = table[where.reshape(-1), data[alive]]
            first += len(parents)
        found = states[self._node_of]
        found[self._node_of < 0] = EMPTY
        return found


class Guide:
    """Keeps one answer within a language, and its length within a limit.

    Args:
        vocabulary: the model's.
        languages: where the expression is.
        start: the expression that the whole answer matches.
        stop: ids that end an answer.
        limit: tokens the answer may have.

    Raises:
        PromptError: no text of the language fits the limit.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        languages: Languages,
        start: int,
        stop: Collection[int],
        limit: int,
    ) -> None:
        self._vocabulary = vocabulary
        self._languages = languages
        self._state = start
        self._stop = list(stop)
        self._n_left = limit
        self._closing: list[int] = []
        self.was_cut = False  # whether the limit decided anything
        if not self._fits(start, limit):
            raise PromptError(
                f"max_tokens: {limit} tokens are too few for the shortest answer of this form"
            )

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self._languages.is_complete(self._state)

    def choose(self, restrict: Callable[[Mask], None], draw: Callable[[], int]) -> int:
        """The next token.

        Args:
            restrict: forbids the ids where the mask (n_ids,) is false.
            draw: samples among those that are left.
        """
        if self._closing:
            return self._take(self._closing.pop(0))
        after = self._vocabulary.after(self._languages, self._state)
        allowed = after != EMPTY
        allowed[self._stop] = self._languages.matches_empty(self._state)
        restrict(allowed)
        token = draw()
        if token in self._stop or self._fits(int(after[token]), self._n_left - 1):
            return self._take(token)
        self.was_cut = True
        far = [s for s in map(int, np.unique(after)) if not self._fits(s, self._n_left - 1)]
        allowed &= ~np.isin(after, far) | np.isin(np.arange(len(after)), self._stop)
        if allowed.any():
            restrict(allowed)
            return self._take(draw())
        self._closing = self._vocabulary.spell(self._languages.shortest(self._state))
        return self._take(self._closing.pop(0))

    def _take(self, token: int) -> int:
        if token not in self._stop:
            self._state = int(self._vocabulary.after(self._languages, self._state)[token])
            self._n_left -= 1
        return token

    def _fits(self, state: int, n_tokens: int) -> bool:
        """Whether what remains can be completed in a number of tokens."""
        n_bytes = self._languages.shortest_length(state)
        if n_bytes <= n_tokens:
            return True
        if n_bytes > n_tokens * self._vocabulary.longest:
            return False
        return len(self._vocabulary.spell(self._languages.shortest(state))) <= n_tokens
