"""A model whose answers a test writes: both engines in Python, as ``edge_vlm.engines`` asks for.

The decoder takes text byte by byte. What it would say next is drawn from everything its context
holds, so that a position too many, one too few or another picture changes the answer; ``enqueue``
puts an answer of the test's own in front. Both engines write down what they are asked for, and fail
or wait where a test wants it.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm import Cancelled, CancelToken, DecoderError, EdgeVLM, MachineSettings
from edge_vlm.families.base import Family
from edge_vlm.families.jina_vlm.family import FAMILY
from edge_vlm.machine.engine_settings import KV_TYPES
from edge_vlm.planning.cost import context_size
from tests.toy import tower
from tests.toy.bundle import write_toy_bundle
from tests.toy.sizes import DECODER, END, FIRST_WORD, HIDDEN, N_IDS, N_MARKERS, PROCESSOR, WORDS

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
TEMPLATE = Path(__file__).parent / "golden" / "tiny-126-tied" / "checkpoint" / "chat_template.jinja"
_CELL = 8  # bytes of what a cell holds; with M-RoPE, three positions follow
_MAGIC = b"toy cell"


@dataclass
class Journal:
    """What the engines were asked for, in order, and what is to go wrong.

    Calls are named ``decoder.context``, ``context.append_tokens``, ``vision.encode`` and so on.
    """

    calls: list[str] = field(default_factory=list)
    # Called inside each piece of work, a batch or a crop, before its result counts.
    during: Callable[[str], None] = lambda _: None
    _failures: dict[str, list[Exception]] = field(default_factory=dict)

    def fail(self, call: str, error: Exception) -> None:
        """Let the next call of that name raise ``error``."""
        self._failures.setdefault(call, []).append(error)

    def note(self, call: str) -> None:
        """A call begins."""
        self.calls.append(call)
        if waiting := self._failures.get(call):
            raise waiting.pop(0)

    def n(self, call: str) -> int:
        """How often it was called."""
        return self.calls.count(call)


@dataclass(frozen=True)
class Appended:
    """One call of ``append_tokens`` (``ids``) or ``append_embeddings`` (``rows``)."""

    start: int  # the first cell
    ids: tuple[int, ...] = ()
    rows: Float32 | None = None
    logits: bool = False
    positions: Int32 | None = None  # (n, 3) with M-RoPE


class FakeContext:
    """One sequence; a cell is eight bytes of what was put there, with M-RoPE and its positions.

    ``appended`` lists what was. There is room for as many cells as were reserved and no more.
    """

    def __init__(self, decoder: FakeDecoder, n_positions: int) -> None:
        self.appended: list[Appended] = []
        self.is_open = True
        self._decoder = decoder
        self._capacity = context_size(n_positions)
        self._cells: list[bytes] = []
        self._logits: Float32 | None = None

    @property
    def n_positions(self) -> int:
        """Cells in use."""
        return len(self._cells)

    @property
    def next_position(self) -> int:
        """Behind all there are."""
        positions = self._positions()
        return int(positions.max()) + 1 if positions.size else self.n_positions

    @property
    def kv_bytes(self) -> int:
        """As llama.cpp would need."""
        return self._capacity * DECODER.kv_bytes_per_token(KV_TYPES[self._decoder.kv_type])

    def reserve(self, n_positions: int) -> None:
        """Make room."""
        self._use("reserve")
        self._capacity = max(self._capacity, context_size(n_positions))

    def truncate(self, n_positions: int) -> None:
        """Forget the rest, and with it a picture that it begins in the middle of."""
        self._use("truncate")
        if self._decoder.has_mrope and n_positions < len(self._cells):
            temporal = self._positions()[:, 0]
            n_positions = int(np.searchsorted(temporal, temporal[n_positions]))
        del self._cells[n_positions:]

    def settle(self) -> None:
        """Nothing to do."""
        self._use("settle")

    def append_tokens(self, ids: Sequence[int], *, logits: bool = False, **how: Any) -> None:
        """One cell an id."""
        self._use("append_tokens")
        assert all(0 <= token < N_IDS for token in ids)
        cells = [int(token).to_bytes(_CELL, "little") for token in ids]
        at = self._places(len(cells))
        self.appended.append(Appended(self.n_positions, tuple(ids), None, logits, at))
        self._append(cells, at, logits, **how)

    def append_embeddings(
        self,
        rows: Float32,
        *,
        positions: Int32 | None = None,
        logits: bool = False,
        **how: Any,
    ) -> None:
        """One cell a row, by its content."""
        self._use("append_embeddings")
        assert rows.shape[1:] == (HIDDEN,)
        assert rows.dtype == np.float32
        at, n_before = self._places(len(rows), positions), self.n_positions
        self.appended.append(Appended(n_before, (), rows.copy(), logits, at))
        try:
            self._append([_digest(row.tobytes()) for row in rows], at, logits, **how)
        except BaseException:
            if positions is not None:  # a picture is there as a whole or not at all
                del self._cells[n_before:]
            raise

    def logits(self) -> Float32:
        """A copy."""
        self._use("logits")
        return self.scores.copy()

    def forbid(self, ids: npt.NDArray[np.bool_]) -> None:
        """Minus infinity."""
        self.scores[ids] = -np.inf

    def state(self, n_positions: int | None = None) -> UInt8:
        """A magic word, and the cells."""
        self._use("state")
        return np.frombuffer(_MAGIC + b"".join(self._cells[:n_positions]), np.uint8).copy()

    @property
    def state_bytes(self) -> int:
        """Its size."""
        return len(_MAGIC) + self._decoder.cell_bytes * self.n_positions

    def set_state(self, state: UInt8) -> bool:
        """Unless it is not a state, or too long."""
        self._use("set_state")
        data = state.tobytes()
        size, n_bytes = self._decoder.cell_bytes, len(data) - len(_MAGIC)
        cells = [data[i : i + size] for i in range(len(_MAGIC), len(data), size)]
        fits = data.startswith(_MAGIC) and n_bytes % size == 0 and len(cells) <= self._capacity
        self._cells = cells if fits else []
        return fits

    def close(self) -> None:
        """Once and for all."""
        self.is_open = False

    def ids(self, start: int) -> list[int]:
        """Of the tokens from a position on."""
        return [int.from_bytes(cell[:_CELL], "little") for cell in self._cells[start:]]

    @property
    def scores(self) -> Float32:
        """The logits themselves."""
        assert self._logits is not None, "nobody asked for the logits of the last position"
        return self._logits

    def _positions(self) -> Int32:
        """(n, 3), without M-RoPE (n, 0): of all cells."""
        data = b"".join(cell[_CELL:] for cell in self._cells)
        return np.frombuffer(data, np.int32).reshape(len(self._cells), -1 if data else 0)

    def _places(self, n: int, positions: Int32 | None = None) -> Int32 | None:
        """(n, 3): positions of new cells; none without M-RoPE."""
        if not self._decoder.has_mrope:
            assert positions is None, "three positions for a decoder that takes one"
            return None
        if positions is None:
            positions = np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1)
        assert positions.shape == (n, 3)
        assert positions.dtype == np.int32
        assert positions.min() >= 0
        assert (np.diff(positions[:, 0]) >= 0).all()
        return positions + np.int32(self.next_position)

    def _append(
        self,
        cells: list[bytes],
        at: Int32 | None,
        logits: bool,
        *,
        cancel: CancelToken | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        decoder = self._decoder
        decoder.is_loaded = True
        self._logits = None
        if at is not None:
            cells = [cell + place.tobytes() for cell, place in zip(cells, at, strict=True)]
        for start in range(0, len(cells), decoder.batch_size):
            if cancel:
                cancel.check()
            batch = cells[start : start + decoder.batch_size]
            decoder.journal.during("decoder")
            if cancel and cancel.is_set:
                raise Cancelled("stopped while the decoder was working")
            if self.n_positions + len(batch) > self._capacity:
                raise DecoderError("there is no room for so many positions")
            self._cells += batch
            if progress:
                progress(start + len(batch))
        if logits:
            self._logits = next_scores(self._cells)

    def _use(self, call: str) -> None:
        if not self.is_open:
            raise DecoderError("the context was closed")
        self._decoder.journal.note(f"context.{call}")


class FakeSampler:
    """Says what was enqueued, as long as that is what was said; otherwise what the logits say."""

    def __init__(
        self, decoder: FakeDecoder, answer: Sequence[int] | None, options: Mapping[str, Any]
    ) -> None:
        self._text = decoder.text
        # What comes next, by what was said, which may have been said with other tokens.
        self._script: dict[bytes, int] = {}
        for place, token in enumerate([*answer, END] if answer is not None else ()):
            self._script[decoder.text((answer or ())[:place])] = token
        self._prompts = {context: context.n_positions for context in [*decoder.contexts]}
        self._temperature = options["temperature"]
        self._random = np.random.default_rng(options["seed"])

    def sample(self, context: FakeContext) -> int:
        """Never an id that is only read, nor one that is forbidden."""
        logits = context.scores[: DECODER.vocab_size].astype(np.float64)
        said = self._text(context.ids(self._prompts[context]))
        if said in self._script:
            logits[self._script[said]] += 1e6
        if not self._temperature:
            return int(logits.argmax())
        shares = np.exp((logits - logits.max()) / self._temperature)
        return int(self._random.choice(len(shares), p=shares / shares.sum()))


class FakeDecoder:
    """A decoder of bytes.

    Args:
        journal: shared with the tower.
        batch_size: cells at once.
        kv_type: element type that the KV cache is said to have.
        has_mrope: whether a cell has three positions.
    """

    def __init__(
        self,
        journal: Journal | None = None,
        *,
        batch_size: int = 32,
        kv_type: str = "f16",
        has_mrope: bool = False,
    ) -> None:
        self.journal = journal or Journal()
        self.batch_size = batch_size
        self.kv_type = kv_type
        self.has_mrope = has_mrope
        self.cell_bytes = _CELL + 12 * has_mrope
        self.contexts: list[FakeContext] = []
        self.sampled: list[dict[str, Any]] = []  # options of the samplers
        self.is_loaded = False
        self.load_seconds = 0.0
        self.is_closed = False
        self._answers: deque[list[int]] = deque()
        self._n_working = 0
        self._guard = threading.Lock()

    def enqueue(self, *answers: str | Sequence[int]) -> None:
        """What the next answers are: texts, or ids where words are among them."""
        for answer in answers:
            ids = self.tokenize(answer) if isinstance(answer, str) else list(answer)
            self._answers.append(ids)

    @property
    def identity(self) -> dict[str, Any]:
        """All that matters."""
        return {"decoder": "fake-mrope" if self.has_mrope else "fake", "kv_type": self.kv_type}

    @property
    def n_ids(self) -> int:
        """Read-only ones included."""
        return N_IDS

    @property
    def chat_template(self) -> str:
        """jina-vlm's."""
        return TEMPLATE.read_text(encoding="utf-8")

    def tokenize(self, text: str) -> list[int]:
        """Its bytes."""
        return list(text.encode())

    def text(self, ids: Sequence[int]) -> bytes:
        """Their bytes."""
        return b"".join(map(self.piece, ids))

    def piece(self, token: int) -> bytes:
        """A byte or a word."""
        if token < END:
            return bytes([token])
        words = WORDS[token - FIRST_WORD :][:1] if token >= FIRST_WORD else ()
        return "".join(words).encode()

    def pieces(self) -> list[bytes]:
        """Of all ids."""
        return [self.piece(token) for token in range(N_IDS)]

    def context(self, n_positions: int) -> FakeContext:
        """Nothing is in it."""
        if self.is_closed:
            raise DecoderError("the model was closed")
        self.journal.note("decoder.context")
        self.contexts.append(FakeContext(self, n_positions))
        return self.contexts[-1]

    @contextmanager
    def sampler(
        self, *, temperature: float, top_p: float, min_p: float, seed: int
    ) -> Iterator[FakeSampler]:
        """Of one answer."""
        options = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "seed": seed}
        with self._guard:
            self.sampled.append(options)
            answer = self._answers.popleft() if self._answers else None
        yield FakeSampler(self, answer, options)

    @contextmanager
    def working(self) -> Iterator[None]:
        """``release`` does nothing meanwhile."""
        with self._guard:
            self._n_working += 1
        try:
            yield
        finally:
            with self._guard:
                self._n_working -= 1

    def release(self) -> None:
        """Unless it works."""
        self.journal.note("decoder.release")
        with self._guard:
            self.is_loaded = self.is_loaded and self._n_working > 0

    def close(self) -> None:
        """No new contexts."""
        self.is_closed = True


class FakeTower:
    """The toy graph in numpy, a crop at a time.

    Args:
        journal: shared with the decoder.
        before_load: as of the real one.
    """

    def __init__(
        self, journal: Journal | None = None, before_load: Callable[[], None] = lambda: None
    ) -> None:
        self.journal = journal or Journal()
        self.is_loaded = False
        self.load_seconds = 0.0
        self.output_shape = (PROCESSOR.tokens_per_crop, HIDDEN)
        self.n_markers = N_MARKERS
        self._before_load = before_load

    @property
    def identity(self) -> dict[str, Any]:
        """All that matters."""
        return {"vision": "fake"}

    @property
    def marker_embeddings(self) -> Float32:
        """(n_markers, hidden_size)."""
        self.load()
        return tower.MARKERS

    def encode_parts(
        self,
        feed: Mapping[str, npt.NDArray[Any]],
        wanted: Sequence[int] | None = None,
        *,
        cancel: CancelToken | None = None,
    ) -> Iterator[tuple[list[int], Float32]]:
        """One part a crop."""
        for index in range(len(feed["crops"])) if wanted is None else wanted:
            self.load()
            if cancel:
                cancel.check()
            self.journal.note("vision.encode")
            self.journal.during("vision")
            if cancel and cancel.is_set:
                raise Cancelled("stopped while encoding the picture")
            yield [index], tower.embed(feed["crops"][[index]], feed["is_last"][[index]])

    def load(self) -> None:
        """Once."""
        if not self.is_loaded:
            self._before_load()
            self.journal.note("vision.load")
            self.is_loaded = True

    def rest(self) -> None:
        """The weights stay."""
        self.journal.note("vision.rest")

    def release(self) -> None:
        """Everything goes."""
        self.journal.note("vision.release")
        self.is_loaded = False


class FakeEngine:
    """A toy bundle and its engines.

    Args:
        folder: where the bundle is written.
        family: of the bundle.
        decoder: options of ``FakeDecoder``.
    """

    def __init__(self, folder: Path, family: Family = FAMILY, **decoder: Any) -> None:
        self.bundle = write_toy_bundle(folder, family)
        self.journal = Journal()
        self.decoder = FakeDecoder(self.journal, **decoder)
        self.vision = FakeTower(self.journal, self.decoder.release)
        self.enqueue = self.decoder.enqueue
        self.fail = self.journal.fail

    def load(self, **settings: Any) -> EdgeVLM:
        """The model, as in a new process; nothing is kept on disk unless ``cache`` says where."""
        self.decoder.is_closed = self.decoder.is_loaded = self.vision.is_loaded = False
        wanted = MachineSettings(
            **{"cache": None, "threads": 1, "kv_type": self.decoder.kv_type, **settings}
        )
        return EdgeVLM.load(self.bundle, settings=wanted, vision=self.vision, decoder=self.decoder)


def next_scores(cells: Sequence[bytes]) -> Float32:
    """(n_ids,): what follows a sequence, in no other way than the sequence decides."""
    seed = int.from_bytes(_digest(b"".join(cells)), "little")
    return np.random.default_rng(seed).normal(0, 2, N_IDS).astype(np.float32)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CELL).digest()
