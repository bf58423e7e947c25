"""A model's tokens, and single bytes, as llguidance sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from edge_vlm.errors import DecoderError, PromptError

Mask = npt.NDArray[np.bool_]
# As llguidance's own, but for objects of thousands of properties, and memory: a state of its lexer
# takes 1 or 2 kB.
NOTHING = "nothing is valid under it"
_LIMITS = LLParserLimits(
    max_items_in_row=20_000,
    step_max_items=200_000,
    max_lexer_states=50_000,
    verbose_errors=False,
    initial_lexer_fuel=600_000,  # twice half a second
)


@cache
def byte_tokenizer() -> LLTokenizer:
    """Each byte is the token of that number."""
    return LLTokenizer("byte")


def byte_matcher(rule: str) -> LLMatcher:
    """What says which byte may come next in a match of ``rule``.

    Args:
        rule: the right side of a rule in llguidance's Lark grammars.

    Raises:
        PromptError: it is not valid, not supported or too large.
    """
    return _of_bytes(rule).deep_copy()


@lru_cache(maxsize=8)
def _of_bytes(rule: str) -> LLMatcher:
    return _compiled(byte_tokenizer(), rule, "")


def _compiled(tokenizer: LLTokenizer, rule: str, lead: str) -> LLMatcher:
    grammar = f"start: {json.dumps(lead)} form\nform: {rule}"
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise PromptError(reason(matcher))
    return matcher


def reason(matcher: LLMatcher) -> str:
    """Why a matcher has failed, in one short line."""
    lines: list[str] = matcher.get_error().splitlines()
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    for start in ("failed to compile JSON schema: ", " (in regex): ", "error: "):
        line = line.rpartition(start)[2]
    if line.startswith("Unsatisfiable schema"):
        return NOTHING
    line = re.sub(r"\d{40,}", lambda found: f"(a number of {len(found[0])} digits)", line)
    return line[:200]


class Vocabulary:
    """The tokens of one model.

    Args:
        pieces: the bytes of each id; empty for ids that stand for no text, which are never allowed.
        stop: ids that end an answer.
        tokenize: the model's own way from text to ids.

    Raises:
        DecoderError: some byte has no token of its own.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        stop: Collection[int],
        tokenize: Callable[[str], list[int]],
    ) -> None:
        self.stop = tuple(stop)
        self._model = _Tokenizer(pieces, self.stop, tokenize)
        # Without slices: a mask of 152,064 ids takes 0.2 ms either way, and they are 40 MB.
        self._tokenizer = LLTokenizer(TokenizerWrapper(self._model), eos_token=[*stop], slices=[])

    def matcher(self, rule: str, lead: str) -> LLMatcher:
        """What says which token may come next in ``lead`` and a match of ``rule``."""
        return _compiled(self._tokenizer, rule, lead)

    def allowed(self, matcher: LLMatcher) -> Mask:
        """(n_ids,) bool: the ids that may come next, those of ``stop`` where the text may end.

        Raises:
            PromptError: the form needs too many states.
        """
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise PromptError(f"the form of the answer is too complex ({reason(matcher)})")
        n_ids = len(self._model.tokens)
        return np.unpackbits(mask, count=n_ids, bitorder="little").view(np.bool_)

    def text(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids."""
        return b"".join(self._model.tokens[token] for token in ids)

    def spell(self, text: bytes) -> list[int]:
        """Ids for these bytes, as the model's own tokenizer gives them where it can."""
        ids: list[int] = self._tokenizer.tokenize_bytes(text)
        return ids

    def spell_bytes(self, text: bytes) -> list[int]:
        """One id a byte."""
        return [self._model.byte_ids[byte] for byte in text]


class _Tokenizer:
    """What ``TokenizerWrapper`` asks of a tokenizer."""

    bos_token_id = None

    def __init__(
        self, pieces: Sequence[bytes], stop: Sequence[int], tokenize: Callable[[str], list[int]]
    ) -> None:
        ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
        if any(bytes([byte]) not in ids for byte in range(256)):
            raise DecoderError("the model has no token for every byte")
        self.byte_ids = [ids[bytes([byte])] for byte in range(256)]
        self.tokens = pieces
        self.eos_token_id = stop[0]
        self.special_token_ids = [i for i, piece in enumerate(pieces) if not piece]
        self._tokenize = tokenize

    def __call__(self, text: bytes) -> list[int]:
        ids = self._tokenize(text.decode())
        if b"".join(self.tokens[token] for token in ids) == text:
            return ids
        return [self.byte_ids[byte] for byte in text]  # as where a special token looks like it
