"""Contexts: KV caches with ids and embeddings going in and logits coming out."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.decoder import llama
from edge_vlm.decoder.llama import (
    N_SEQUENCES,
    cell_positions,
    copy_cells,
    free_with,
    move_cells,
)
from edge_vlm.errors import Cancelled, DecoderError
from edge_vlm.machine import process
from edge_vlm.machine.engine_settings import (
    FLASH_ROWS,
    FLASH_TILE,
    KV_TYPES,
    SCORES_BATCH,
    EngineSettings,
    flash_mode,
)
from edge_vlm.machine.memory import give_back_memory
from edge_vlm.planning.budget import context_size

if TYPE_CHECKING:
    from edge_vlm.decoder.llama import Weights
    from edge_vlm.progress import CancelToken

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
_ABORTED = 2  # llama_decode's result when the abort callback answered true


@dataclass(frozen=True)
class ContextSettings:
    """How contexts compute and store."""

    engines: EngineSettings
    kv_type: str = "f16"
    kv_budget: int | None = None  # bytes of all KV caches of a context

    flash_attention: str = field(init=False)  # off, on, auto or prefill: what becomes of it

    def __post_init__(self) -> None:
        wanted, batch_size = self.engines.flash_attention, self.engines.batch_size
        object.__setattr__(self, "flash_attention", flash_mode(wanted, self.kv_type, batch_size))


class Context:
    """One sequence in a KV cache. Not safe for use by two threads at once.

    It is created when it is first used. While the weights are released, its content is parked as
    bytes. What is cached is counted in cells, one a token or row of a picture, and so is the room
    for it. The positions that the model turns its vectors by are another count with M-RoPE: there a
    picture's cells share the temporal one, so that llama.cpp can forget them together alone.

    Args:
        weights: of the model.
        settings: how it computes and stores.
        n_positions: room that it has at least.
        on_close: called when it was closed.
    """

    def __init__(
        self,
        weights: Weights,
        settings: ContextSettings,
        n_positions: int,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._weights = weights
        self._settings = settings
        self._on_close = on_close
        self._api = weights.api
        self._closed = False
        self._context: Any = None
        self._free: Callable[[], object] | None = None
        self._guard = threading.Lock()  # of closing and parking, which other threads may do
        self._capacity = context_size(n_positions)
        self._parked: UInt8 | None = None
        self._at: list[int] = []  # the (temporal) position of each cell, never falling
        self._next = 0  # the position of what follows
        self._room = 0  # cells of the llama.cpp context
        self._flash = False  # whether it is laid out for a prompt alone, see ``_arrange``

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def capacity(self) -> int:
        """Cells there is room for."""
        return self._capacity

    @property
    def n_positions(self) -> int:
        """Cells in use."""
        return len(self._at)

    @property
    def next_position(self) -> int:
        """What the next token is turned by; without M-RoPE the number of cells."""
        return self._next

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for the KV cache."""
        return self._kv_bytes(self.capacity)

    def reserve(self, n_positions: int) -> None:
        """Make room for ``n_positions`` cells in all; what is cached stays.

        Raises:
            DecoderError: llama.cpp could not create the larger context.
        """
        if n_positions <= self.capacity:
            return
        before, self._capacity = self._capacity, context_size(n_positions)
        if self._context is None:
            return
        try:
            self._arrange()
        except DecoderError:
            self._capacity = before
            raise

    def state(self, n_positions: int | None = None) -> UInt8:
        """What is cached, as bytes for ``set_state`` of a context with the same settings.

        Args:
            n_positions: so many cells of it; all by default.

        Raises:
            DecoderError: llama.cpp failed.
        """
        self._arrange()
        return self._copy(n_positions)

    @property
    def state_bytes(self) -> int:
        """Size of what ``state`` gives: the used part of the KV cache and a small header."""
        return int(self._api.llama_state_seq_get_size(self._open(), 0))

    def set_state(self, state: UInt8) -> bool:
        """Replace what is cached; false, and nothing cached, if it does not fit."""
        self._arrange()
        self._at, self._next = [], 0
        if len(state) and self._fill(self._open(), state):
            with contextlib.suppress(DecoderError):  # llama.cpp took what it did not write
                self._at, self._next = cell_positions(state, self._weights.has_mrope)
                return True
        self._api.llama_memory_seq_rm(self._memory(), 0, -1, -1)
        return False

    def settle(self) -> None:
        """Do now what the first token of an answer would have to wait for."""
        self._arrange()

    def truncate(self, n_positions: int) -> None:
        """Forget all but the first ``n_positions`` cells; a picture of M-RoPE goes as a whole."""
        if n_positions < len(self._at):
            self._next = self._at[n_positions]
            del self._at[bisect_left(self._at, self._next) :]
            self._api.llama_memory_seq_rm(self._memory(), 0, self._next, -1)

    def append_tokens(self, ids: Sequence[int], **options: Any) -> None:
        """Prefill token ids; options as ``append_embeddings``."""
        self._append(np.asarray(ids, np.int32), **options)

    def append_embeddings(
        self, rows: Float32, *, positions: Int32 | None = None, **options: Any
    ) -> None:
        """Prefill rows of shape (n, hidden_size), batch by batch.

        Args:
            rows: decoder input embeddings, float32.
            positions: (n, 3) of a whole picture with M-RoPE, see ``Family.positions``; each row has
                the next one by default.
            options: ``logits`` (default false) computes them for the last position, ``cancel``
                stops between two operators, ``progress`` is called with the positions done.

        Raises:
            Cancelled: ``cancel`` was set; the batches done stay cached, but of a picture with
                ``positions`` nothing.
            DecoderError: llama.cpp failed, or the model takes one position a row.
        """
        rows = np.ascontiguousarray(rows, np.float32)
        if positions is None:
            self._append(rows, **options)
            return
        if not self._weights.has_mrope:
            raise DecoderError(f"{self._weights.path}: takes one position a token, not three")
        n_before = len(self._at)
        try:
            self._append(rows, np.asarray(positions, np.int32).T, **options)
        except BaseException:
            self.truncate(n_before)
            raise

    def forbid(self, ids: npt.NDArray[np.bool_]) -> None:
        """Give those of the ids (vocabulary,) that are set a logit of minus infinity."""
        pointer = self._api.llama_get_logits_ith(self._open(), -1)
        np.ctypeslib.as_array(pointer, (self._weights.n_ids,))[ids] = -np.inf

    def logits(self) -> Float32:
        """(vocabulary,) float32: scores of the token that follows, a copy."""
        pointer = self._api.llama_get_logits_ith(self._open(), -1)
        logits: Float32 = np.ctypeslib.as_array(pointer, (self._weights.n_ids,)).copy()
        return logits

    def sample(self, chain: Any) -> int:
        """The next token, picked by one of llama.cpp's samplers."""
        return int(self._api.llama_sampler_sample(chain, self._open(), -1))

    def close(self) -> None:
        """Free the KV cache."""
        with self._guard:
            self._closed = True
            self._drop()
            self._at, self._next, self._parked = [], 0, None
        self._on_close()

    @property
    def is_open(self) -> bool:
        """Whether it was not closed yet."""
        return not self._closed

    def park(self) -> None:
        """Keep the content as bytes and free the context, which refers to the weights."""
        with self._guard:
            if self._context is not None:
                self._parked = self.state() if self._at else None
                self._drop()

    def _drop(self) -> None:
        if self._free:
            self._free()
        self._free = self._context = None

    def _copy(self, n_positions: int | None = None) -> UInt8:
        """As ``state``, in the present layout."""
        n = len(self._at) if n_positions is None else min(n_positions, len(self._at))
        return copy_cells(self._api, self._open(), 0, [*self._at, self._next][n])

    def _fill(self, context: Any, state: UInt8) -> bool:
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return bool(self._api.llama_state_seq_set_data(context, data, len(state), 0))

    def _hold(self, context: Any, room: int, flash: bool = False) -> None:
        self._context, self._room, self._flash = context, room, flash
        self._free = free_with(self, self._api.llama_free, context)

    def _arrange(self, n_rows: int = 0) -> None:
        """Lay the KV cache out for the next ``n_rows`` cells; 0: for an answer.

        With flash attention for prompts alone, a long one gets a context of its own, from which
        the KV cache is moved when something else is asked for. What is in front of it is short,
        and room for the rest is made only then: there are never more than two caches.
        """
        n_cached, room = self.n_positions, self._capacity
        old = self._open() if n_cached else self._context
        flash = self._takes_flash(n_rows, n_cached)
        before_a_picture = self._settings.flash_attention == "prefill" and 0 < n_rows < FLASH_TILE
        if flash or (before_a_picture and not n_cached):
            room = context_size(n_cached + n_rows)
        needed = n_cached + n_rows if n_rows else room
        if old is not None and flash == self._flash and needed <= self._room:
            return
        new = self._create(room, flash)
        try:
            if n_cached and flash != self._flash:
                move_cells(self._weights, old, new, self._next)
            elif n_cached and not self._fill(new, self._copy()):
                raise DecoderError("llama.cpp could not move the KV cache to another context")
        except DecoderError:
            self._api.llama_free(new)
            raise
        if old is not None:
            self._drop()
            give_back_memory()  # a cache of a hundred megabytes may lie in the C library's heap
        self._hold(new, room, flash)

    def _takes_flash(self, n_rows: int, n_cached: int) -> bool:
        if self._settings.flash_attention != "prefill":
            return False
        # With M-RoPE, a picture's cells are copied at once when they move.
        prompt, n_copies = self._kv_bytes(n_cached + n_rows), 2 if self._weights.has_mrope else 1
        budget = self._settings.kv_budget
        if budget is not None and self.kv_bytes + n_copies * prompt > budget:
            return False
        return n_rows >= FLASH_ROWS and (self._flash or n_rows >= n_cached)

    def _create(self, n_positions: int, flash: bool = False) -> Any:
        """An empty context; with ``flash`` for a prompt alone."""
        api, engines = self._api, self._settings.engines
        model = self._weights.model()
        params = api.llama_context_default_params()
        params.n_ctx = n_positions
        params.n_seq_max, params.kv_unified = N_SEQUENCES, True
        # Logits are read for the last position only, but there is room for no fewer than sequences.
        params.n_outputs_max = N_SEQUENCES
        flash_attention, batch_size = self._settings.flash_attention, engines.batch_size
        if flash_attention == "prefill":
            flash_attention = "on" if flash else "off"
            if not flash:
                batch_size = min(batch_size, SCORES_BATCH)
        params.n_batch = params.n_ubatch = min(batch_size, params.n_ctx)
        params.n_threads = engines.threads
        params.n_threads_batch = engines.prefill_threads
        params.type_k = params.type_v = llama.ggml_type(self._settings.kv_type)
        params.no_perf = True
        # On a CPU, llama.cpp's flash attention adds up V in half precision where less than 64
        # positions are computed at once, as for every token of an answer: at 1,776 positions
        # logits move by up to 1.6 % of their range. Without it, or from 64 positions on, they are
        # right to 5e-5.
        params.flash_attn_type = {
            "off": api.LLAMA_FLASH_ATTN_TYPE_DISABLED,
            "on": api.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            "auto": api.LLAMA_FLASH_ATTN_TYPE_AUTO,
        }[flash_attention]
        process.forget_errors()
        context = api.llama_init_from_model(model, params)
        if not context:
            raise DecoderError(f"llama.cpp could not create a context{process.because()}")
        return context

    def _append(
        self,
        rows: npt.NDArray[Any],
        behind: Int32 | None = None,
        *,
        logits: bool = False,
        cancel: CancelToken | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Rows or ids; ``behind``: their positions, (n,) or (3, n), counted from the next one."""
        process.note_work()
        self._arrange(len(rows))
        api, context = self._api, self._open()
        at = np.arange(len(rows), dtype=np.int32) if behind is None else behind
        at = at + np.int32(self._next)
        batches = _batches(len(rows), int(api.llama_n_batch(context)), self._flash)
        if cancel:
            address = ctypes.cast(cancel.buffer, ctypes.c_void_p)
            api.llama_set_abort_callback(context, llama.abort_when_set(), address)
        try:
            for start, stop in batches:
                if cancel:
                    cancel.check()
                wanted = np.zeros(stop - start, np.int8)
                wanted[-1] = logits and stop == len(rows)
                self._decode(rows[start:stop], at[..., start:stop], wanted, cancel)
                self._at += np.atleast_2d(at)[0, start:stop].tolist()
                self._next = int(at[..., :stop].max()) + 1
                if progress:
                    progress(stop)
        finally:
            if cancel:
                api.llama_set_abort_callback(context, llama.never_abort(), None)

    def _decode(
        self,
        part: npt.NDArray[Any],
        at: Int32,
        wanted: npt.NDArray[np.int8],
        cancel: CancelToken | None,
    ) -> None:
        api = self._api
        batch = api.llama_batch()  # without sequence ids: sequence 0
        batch.n_tokens = len(part)
        if part.ndim == 1:
            batch.token = part.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        else:
            batch.embd = part.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            if self._weights.has_mrope:  # planes of t, h, w and nothing; of ids, one is enough
                planes = np.zeros((4, len(part)), np.int32)
                planes[:3] = at
                at = planes
        at = np.ascontiguousarray(at, np.int32)
        batch.pos = at.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        process.forget_errors()
        result = api.llama_decode(self._open(), batch)
        if result == 0:
            return
        api.llama_memory_seq_rm(self._memory(), 0, self._next, -1)  # what it may have left
        if result == _ABORTED and cancel and cancel.is_set:
            raise Cancelled("stopped while the decoder was working")
        raise DecoderError(f"llama.cpp failed with code {result}{process.because()}")

    def _kv_bytes(self, n_positions: int) -> int:
        """Bytes of a KV cache for at least so many cells."""
        element = KV_TYPES[self._settings.kv_type]
        return context_size(n_positions) * self._weights.geometry.kv_bytes_per_token(element)

    def _memory(self) -> Any:
        return self._api.llama_get_memory(self._open())

    def _open(self) -> Any:
        if self._closed:
            raise DecoderError("the context was closed")
        if self._context is None:
            new = self._create(self._capacity)
            if self._parked is not None and not self._fill(new, self._parked):
                self._api.llama_free(new)
                raise DecoderError("llama.cpp could not fill the KV cache again")
            self._hold(new, self._capacity)
            self._parked = None
        return self._context


def _batches(n_rows: int, size: int, flash: bool) -> list[tuple[int, int]]:
    """(start, stop) of batches of at most ``size``; with flash attention none is too small."""
    stops = [*range(size, n_rows, size), n_rows]
    if flash and len(stops) > 1 and n_rows - stops[-2] < FLASH_TILE < size:
        stops[-2] = n_rows - FLASH_TILE
    return list(zip([0, *stops], stops, strict=False))
