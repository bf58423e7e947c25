"""Keeps one answer in its form, and its length within a limit.

At each moment an ending is known that fits what is left of the limit; a token after which none is
found is not taken. So an answer that the limit ends is of the form all the same. Only where no
ending is found at the start is there no such promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llguidance import LLMatcher

from edge_vlm.errors import PromptError
from edge_vlm.forms.ending import MAX_ENDING_BYTES, endings, ends, forces
from edge_vlm.forms.vocabulary import Mask, Vocabulary, byte_matcher, reason

if TYPE_CHECKING:
    from edge_vlm.forms.structure import Form

_MAX_FORCED = 1000  # bytes, in a form without a known ending
_DRAWS = 4  # tokens that do not fit, one after another, before the ending is written
_SUFFIXES = 64  # bytes of an ending that may have come to stand in the answer already


class Constraint:
    """One answer.

    Args:
        vocabulary: the model's.
        form: what the answer must be.
        lead: what is written in front of it, by the model too.
        limit: tokens the answer may have.

    Raises:
        PromptError: no text of the form fits the limit.
    """

    def __init__(self, vocabulary: Vocabulary, form: Form, lead: str, limit: int) -> None:
        self._vocabulary = vocabulary
        self._hints = form.hints
        self._tokens = vocabulary.matcher(form.rule, lead)
        self._lead = lead.encode()  # what is left of it; it is not in ``_bytes``
        self._bytes = byte_matcher(form.rule)
        self._n_left = limit
        self.was_cut = False  # whether the limit decided anything
        self._ending: bytes | None = None
        self._ending = self._find(self._bytes, limit, self._lead)
        # Without one the limit cuts the answer where it is.
        self._is_reserved = self._ending is not None
        if not self._is_reserved and (
            forces(self._bytes, _MAX_FORCED)  # llguidance spells all of it for every token
            or any(endings(self._bytes, MAX_ENDING_BYTES, self._hints))
        ):
            raise PromptError(
                f"max_tokens: {limit} tokens are too few for the shortest answer of this form"
            )

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._tokens.is_stopped())

    def forced(self) -> list[int]:
        """The tokens that come next whatever the model says, if any; they are taken."""
        # Without a known ending they may be millions: a{99999999}.
        ids: list[int] = self._tokens.compute_ff_tokens() if self._is_reserved else []
        return ids if not ids or self._takes(ids) else self._end()

    def choose(self, restrict: Callable[[Mask], None], draw: Callable[[], int]) -> list[int]:
        """The next tokens, which are taken: one, or the rest of the answer where room runs out.

        ``restrict`` forbids the ids where the mask (n_ids,) is false, ``draw`` samples the others.

        Raises:
            PromptError: the form needs too many states.
        """
        allowed = self._vocabulary.allowed(self._tokens)
        for _ in range(_DRAWS):
            if not allowed.any():
                break
            restrict(allowed)
            token = draw()
            if token in self._vocabulary.stop or self._takes([token]):
                return [token]
            self.was_cut = True
            allowed[token] = False
        return self._end()

    def _takes(self, ids: Sequence[int]) -> bool:
        """Take tokens if the answer can be ended after them within the limit."""
        n_left = self._n_left - len(ids)
        if self._is_reserved:
            text = self._vocabulary.text(ids)
            lead, text = self._lead[len(text) :], text[len(self._lead) :]
            state = self._bytes.deep_copy()
            if not state.consume_tokens([*text]):
                return False
            ending = self._find(state, n_left, lead, text)
            if ending is None:
                return False
            self._bytes, self._ending, self._lead = state, ending, lead
        if not self._tokens.consume_tokens([*ids]):
            raise PromptError(f"the form of the answer is too complex ({reason(self._tokens)})")
        self._n_left = n_left
        return True

    def _find(self, state: LLMatcher, n_left: int, lead: bytes, text: bytes = b"") -> bytes | None:
        """An ending of ``n_left`` tokens with ``lead``; ``text`` was said since one was known."""
        known = self._ending
        if known is not None:
            start = len(text) if known.startswith(text) else 0
            for skip in range(start, min(len(known), start + _SUFFIXES) + 1):
                if ends(state, known[skip:]) and self._fits(lead + known[skip:], n_left):
                    return known[skip:]
        found = endings(state, min(16 * n_left + 64, MAX_ENDING_BYTES), self._hints)
        return next((ending for ending in found if self._fits(lead + ending, n_left)), None)

    def _fits(self, ending: bytes, n_left: int) -> bool:
        return len(ending) <= n_left or len(self._vocabulary.spell(ending)) <= n_left

    def _end(self) -> list[int]:
        """Take the known ending; a stop if that is nothing."""
        self.was_cut = True
        ending = self._lead + (self._ending or b"")
        ids = self._vocabulary.spell(ending)
        if len(ids) > self._n_left:
            ids = self._vocabulary.spell_bytes(ending)
        self._tokens.consume_tokens(ids)
        self._ending, self._lead, self._n_left = b"", b"", self._n_left - len(ids)
        return ids or [self._vocabulary.stop[0]]
