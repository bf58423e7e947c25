"""One of some answers: what may be asked for, and how likely each is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import PromptError

if TYPE_CHECKING:
    from edge_vlm.engines import Context
    from edge_vlm.progress import CancelToken

MAX_CHOICES = 1000
MAX_CHOICE_CHARS = 1000


def check_choices(choices: Any) -> tuple[str, ...]:
    """The choices as a tuple.

    Raises:
        PromptError: they are not at least two different texts.
    """
    if isinstance(choices, str | bytes) or not isinstance(choices, Sequence):
        raise PromptError("choices: must be a list of texts")
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise PromptError(f"choices: must be from 2 to {MAX_CHOICES}, not {len(choices)}")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip() or choice != choice.strip():
            raise PromptError(f"choices: {choice!r} is not a text without space around it")
        if len(choice) > MAX_CHOICE_CHARS or any("\ud800" <= c <= "\udfff" for c in choice):
            raise PromptError(f"choices: {choice[:20]!r}... is too long or not valid Unicode")
    if len(set(choices)) < len(choices):
        raise PromptError("choices: one is there twice")
    return tuple(choices)


def log_probabilities(
    context: Context,
    answers: Sequence[Sequence[int]],
    stop: Collection[int],
    n_generated: int,
    cancel: CancelToken | None = None,
    progress: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """Natural logarithms of the probabilities that the model says each answer, and then stops.

    Tokens that answers begin with together are computed once. The context is as before afterwards,
    but for the logits.

    Args:
        context: holds the prompt, with logits for its last position.
        answers: token ids of each, all different.
        stop: ids that end an answer.
        n_generated: ids from this one on are never generated.
        cancel: stops between two operators.
        progress: called with the tokens done.

    Raises:
        Cancelled: ``cancel`` was set.
    """
    n_prompt = context.n_positions
    found = np.zeros(len(answers))
    endings = list(stop)
    n_done = 0
    # Branches of the trie still to follow: depth, the token there, the answers that have it.
    todo: list[tuple[int, int, list[int]]] = []

    def look(depth: int, members: list[int]) -> None:
        logits = context.logits()[:n_generated].astype(np.float64)
        logits -= np.logaddexp.reduce(logits)
        branches: dict[int, list[int]] = {}
        for member in members:
            if len(answers[member]) == depth:
                found[member] += np.logaddexp.reduce(logits[endings])
            else:
                token = answers[member][depth]
                found[member] += logits[token]
                branches.setdefault(token, []).append(member)
        todo.extend((depth, token, having) for token, having in branches.items())

    look(0, list(range(len(answers))))
    while todo:
        depth, token, members = todo.pop()
        context.truncate(n_prompt + depth)
        context.append_tokens([token], logits=True, cancel=cancel)
        n_done += 1
        if progress:
            progress(n_done)
        look(depth + 1, members)
    context.truncate(n_prompt)
    return found
