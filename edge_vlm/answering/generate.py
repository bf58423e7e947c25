"""An answer from a prefilled context: token by token, or the likeliest of some."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import Cancelled
from edge_vlm.forms.choices import log_probabilities
from edge_vlm.progress import CancelToken, OnProgress, Progress

if TYPE_CHECKING:
    from edge_vlm.answering.answer import AskOptions, Clock
    from edge_vlm.bundle.manifest import Manifest
    from edge_vlm.engines import Context, Decoder, Sampler
    from edge_vlm.forms.constraint import Constraint
    from edge_vlm.forms.repetition import RepetitionGuard

LONG_ANSWER = 64  # tokens; shorter ones are not looked at for loops


@dataclass(frozen=True)
class Reply:
    """What the model said: its text as generated, the space in front included."""

    text: str
    ids: tuple[int, ...]
    finish: str
    n_computed: int  # tokens that took time to decode
    probabilities: dict[str, float] | None = None


def generate(
    decoder: Decoder,
    context: Context,
    options: AskOptions,
    *,
    stop: Collection[int],
    max_tokens: int,
    constraint: Constraint | None,
    lead: str,
    clock: Clock,
    progress: OnProgress,
    cancel: CancelToken | None,
    keep_partial: bool,
) -> Generator[str, None, Reply]:
    """Sample an answer; yields pieces of it without ``lead`` or space in front.

    The context holds the prompt, with logits for its last position. ``lead`` is what the template
    writes between a prompt and an answer. Seconds are added to ``clock``, the reader's time is not
    counted. With ``keep_partial`` an answer that is cancelled after its first token ends there.

    Raises:
        Cancelled: ``cancel`` was set.
        DecoderError: llama.cpp failed.
    """
    text = _Text(decoder, lead, options, is_formed=constraint is not None)
    ids: list[int] = []
    finish = "length"
    seed = secrets.randbits(32) if options.seed is None else options.seed
    sampler_of = decoder.sampler(
        temperature=options.temperature, top_p=options.top_p, min_p=options.min_p, seed=seed
    )
    with sampler_of as sampler:
        tokens = _Tokens(context, sampler, constraint, clock)
        while len(ids) < max_tokens:
            try:
                said = tokens.next(ids, cancel)
            except Cancelled:
                if not (keep_partial and ids and constraint is None):
                    raise
                finish = "cancelled"
                break
            has_ended = said[0] in stop
            if not has_ended:
                ids += said
                progress(Progress("decode", len(ids), max_tokens))
                if reply := text.before_loop(ids):
                    return reply
                if shown := text.add(said):
                    yield shown
            if has_ended or (constraint and constraint.is_complete):
                finish = "length" if constraint and constraint.was_cut else "stop"
                break
    if rest := text.end():
        yield rest
    return Reply(text.raw, tuple(ids), finish, len(ids))


class _Tokens:
    """What follows in an answer, as its form and the sampler have it."""

    def __init__(
        self, context: Context, sampler: Sampler, constraint: Constraint | None, clock: Clock
    ) -> None:
        self._clock = clock
        self._context = context
        self._sampler = sampler
        self._constraint = constraint
        self._n_decoded = 0  # tokens of the answer that the context holds

    def next(self, ids: Sequence[int], cancel: CancelToken | None) -> list[int]:
        """One token or more after ``ids``."""
        started = time.perf_counter()
        said = self._next(ids, cancel)
        self._clock.decode += time.perf_counter() - started
        return said

    def _next(self, ids: Sequence[int], cancel: CancelToken | None) -> list[int]:
        # What the form leaves no choice about waits, to be decoded with what follows.
        if self._constraint and (forced := self._constraint.forced()):
            return forced
        if cancel:
            cancel.check()
        if self._n_decoded < len(ids):
            self._context.append_tokens(ids[self._n_decoded :], logits=True, cancel=cancel)
        self._n_decoded = len(ids)
        draw = partial(self._sampler.sample, self._context)
        if self._constraint is None:
            return [draw()]
        return self._constraint.choose(lambda allowed: self._context.forbid(~allowed), draw)


class _Text:
    """An answer's text: as generated, and the part of it that is shown."""

    def __init__(
        self, decoder: Decoder, lead: str, options: AskOptions, *, is_formed: bool
    ) -> None:
        self.raw = ""
        self._loops = _Loops(decoder) if options.loop_guard and not is_formed else None
        self._decoder = decoder
        self._lead = lead
        self._is_formed = is_formed
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Sequence[int]) -> str:
        """What is to be shown of some tokens: no ``lead``, no space in front."""
        before, piece = self.raw, "".join(self._utf8.decode(self._decoder.piece(i)) for i in ids)
        self.raw += piece
        if self._is_formed:
            return self.raw.removeprefix(self._lead)[len(before.removeprefix(self._lead)) :]
        return piece if before.strip() else piece.lstrip()

    def before_loop(self, ids: Sequence[int]) -> Reply | None:
        """The answer up to its first repeat, if it says the same over and over."""
        return self._loops.cut(ids) if self._loops else None

    def end(self) -> str:
        """What the bytes of half a character come to."""
        rest = self._utf8.decode(b"", final=True)
        self.raw += rest
        return rest


class _Loops:
    """Looks for a loop in an answer that has got long enough for one."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._guard: RepetitionGuard | None = None
        self._n_seen = 0

    def cut(self, ids: Sequence[int]) -> Reply | None:
        """The answer before its first repeat, if it says the same over and over."""
        if len(ids) < LONG_ANSWER:
            return None
        if self._guard is None:
            from edge_vlm.forms.repetition import RepetitionGuard

            self._guard = RepetitionGuard(self._decoder.piece)
        n_kept = self._guard.add(ids[self._n_seen :])
        self._n_seen = len(ids)
        if n_kept is None:
            return None
        said = b"".join(map(self._decoder.piece, ids[:n_kept])).decode("utf-8", "replace")
        return Reply(said, tuple(ids[:n_kept]), "repetition", len(ids))


def pick(
    manifest: Manifest,
    context: Context,
    choices: Mapping[str, Sequence[int]],
    *,
    lead: str,
    clock: Clock,
    progress: OnProgress,
    cancel: CancelToken | None,
) -> Generator[str, None, Reply]:
    """The likeliest of some answers, each given with its ids (those of ``lead`` in front).

    It is yielded in one piece; other arguments and errors as ``generate``.
    """
    started = time.perf_counter()
    total = sum(map(len, choices.values()))
    n_computed = 0

    def report(done: int) -> None:
        nonlocal n_computed
        n_computed = done
        progress(Progress("decode", done, total))

    logs = log_probabilities(
        context,
        list(choices.values()),
        manifest.tokens.stop,
        manifest.decoder.vocab_size,
        cancel,
        report,
    )
    shares = np.exp(logs - logs.max())
    shares /= shares.sum()
    best = list(choices)[int(logs.argmax())]
    clock.decode += time.perf_counter() - started
    yield best
    probabilities = dict(zip(choices, map(float, shares), strict=True))
    return Reply(lead + best, tuple(choices[best]), "stop", n_computed, probabilities)
