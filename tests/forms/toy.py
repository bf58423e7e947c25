"""A small vocabulary, and a model of random logits: forms without llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_vlm.forms.constraint import Constraint
from edge_vlm.forms.structure import Form
from edge_vlm.forms.vocabulary import Vocabulary

WORDS = [
    *('", "', '": "', '": ', '{"', '"}', '"]', "}]", '"}}', "[]", "{}", "],", "},", ', "', '",'),
    *(' {"', ' "', "null", "true", "false", "name", "price", "answer", "count", " the", " a"),
    *("aa", "aaaa", "        ", "11", "00", "2020-", "-01-", ".5", "0.", "é", "é!", "漢", "ab"),
    *("END", "yes", "no", "\\n", '\\"', "  ", "xx", "kids", "value", "op", "add", "num"),
]
PIECES = [bytes([byte]) for byte in range(256)] + [word.encode() for word in WORDS]
PIECES += [b"\xa9!", b"", b"", b""]
STOP = (len(PIECES) - 1, len(PIECES) - 3)


LONGEST_FIRST = sorted((i for i, p in enumerate(PIECES) if p), key=lambda i: -len(PIECES[i]))
STARTING = {b: [i for i in LONGEST_FIRST if PIECES[i][0] == b] for b in range(256)}


def spell(text: str) -> list[int]:
    """The longest token each time."""
    data, ids, at = text.encode(), [], 0
    while at < len(data):
        ids.append(next(i for i in STARTING[data[at]] if data.startswith(PIECES[i], at)))
        at += len(PIECES[ids[-1]])
    return ids


VOCABULARY = Vocabulary(PIECES, STOP, spell)


@dataclass
class Said:
    """An answer of random logits."""

    text: str
    n_tokens: int
    n_drawn: int
    was_cut: bool


def answer(form: Form, limit: int, seed: int, *, lead: str = "", plain: float = 4.0) -> Said:
    """What a model says whose logits are random; those of plain ASCII are higher by ``plain``."""
    rng = np.random.default_rng(seed)
    constraint = Constraint(VOCABULARY, form, lead, limit)
    liked = np.array([plain * (p.isascii() and p.isalnum()) for p in PIECES])
    logits = np.zeros(0)
    ids: list[int] = []
    n_drawn = 0

    def restrict(allowed: npt.NDArray[np.bool_]) -> None:
        assert allowed.any()
        logits[~allowed] = -np.inf

    def draw() -> int:
        assert np.isfinite(logits).any()
        return int(logits.argmax())

    while len(ids) < limit:
        said = constraint.forced()
        if not said:
            logits = liked + rng.gumbel(size=len(PIECES))
            n_drawn += 1
            said = constraint.choose(restrict, draw)
        if said[0] in STOP:
            break
        ids += said
        if constraint.is_complete:
            break
    text = b"".join(PIECES[token] for token in ids).decode()
    assert text.startswith(lead)
    return Said(text.removeprefix(lead), len(ids), n_drawn, constraint.was_cut)
