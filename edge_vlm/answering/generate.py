"""An answer from a prefilled context: token by token, or the likeliest of some."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_vlm.answering.answer import AskOptions, Clock
from edge_vlm.bundle.manifest import Manifest
from edge_vlm.engines import Context, Decoder
from edge_vlm.errors import Cancelled
from edge_vlm.forms.choices import log_probabilities
from edge_vlm.progress import CancelToken, OnProgress, Progress

if TYPE_CHECKING:
    from edge_vlm.forms.constraint import Constraint


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

    Args:
        decoder: whose context it is.
        context: holds the prompt, with logits for its last position.
        options: how to sample.
        stop: ids that end an answer.
        max_tokens: the answer's largest length.
        constraint: keeps it in the form it is to have.
        lead: what the template writes between a prompt and an answer.
        clock: seconds are added to it; the reader's time is not counted.
        progress: told of every token.
        cancel: stops between two operators.
        keep_partial: an answer that is cancelled after its first token ends there.

    Raises:
        Cancelled: ``cancel`` was set.
        DecoderError: llama.cpp failed.
    """
    ids: list[int] = []
    n_decoded = 0  # of them that the context holds
    raw = ""
    finish = "length"
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    with decoder.sampler(
        temperature=options.temperature, top_p=options.top_p, min_p=options.min_p, seed=seed
    ) as sampler:

        def restrict(allowed: npt.NDArray[np.bool_]) -> None:
            context.forbid(~allowed)

        def draw() -> int:
            return sampler.sample(context)

        while len(ids) < max_tokens:
            started = time.perf_counter()
            # What the form leaves no choice about waits, to be decoded with what follows.
            said = constraint.forced() if constraint else []
            if not said:
                try:
                    if cancel:
                        cancel.check()
                    if n_decoded < len(ids):
                        context.append_tokens(ids[n_decoded:], logits=True, cancel=cancel)
                except Cancelled:
                    if not (keep_partial and ids and constraint is None):
                        raise
                    finish = "cancelled"
                    break
                n_decoded = len(ids)
                said = constraint.choose(restrict, draw) if constraint else [draw()]
            clock.decode += time.perf_counter() - started
            if said[0] in stop:
                finish = "length" if constraint and constraint.was_cut else "stop"
                break
            ids += said
            progress(Progress("decode", len(ids), max_tokens))
            piece = "".join(utf8.decode(decoder.piece(token)) for token in said)
            if constraint:
                shown = (raw + piece).removeprefix(lead)[len(raw.removeprefix(lead)) :]
            else:
                shown = piece if raw.strip() else piece.lstrip()
            raw += piece
            if shown:
                yield shown
            if constraint and constraint.is_complete:
                finish = "length" if constraint.was_cut else "stop"
                break
    if rest := utf8.decode(b"", final=True):
        raw += rest
        yield rest
    return Reply(raw, tuple(ids), finish, len(ids))


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
