"""The language model in llama.cpp: weights and vocabulary, and contexts that hold a KV cache."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm import llama
from edge_vlm.bundle import DECODER_NAME, Bundle
from edge_vlm.cancel import CancelToken
from edge_vlm.cost import context_size
from edge_vlm.engine_settings import (
    FLASH_ROWS,
    FLASH_TILE,
    SCORES_BATCH,
    EngineSettings,
    flash_mode,
    untuned,
)
from edge_vlm.errors import BundleError, Cancelled, DecoderError
from edge_vlm.guide import Vocabulary
from edge_vlm.kv_move import N_SEQUENCES, copy_cells, move_cells
from edge_vlm.machine import KV_TYPES
from edge_vlm.memory import give_back_memory
from edge_vlm.providers import gpu_layers

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
_ABORTED = 2  # llama_decode's result when the abort callback answered true


class Decoder:
    """Weights, vocabulary and chat template of a bundle's ``decoder.gguf``.

    With ``in_turns``, the weights are loaded when a context is used and can be released again;
    contexts survive that. A context keeps its KV caches, of which it may have two, within
    ``kv_budget`` bytes where it can choose.

    Raises:
        BundleError: llama.cpp cannot load it, or it differs from the manifest.
        InputError: a GPU was asked for, and this llama.cpp cannot use one.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: EngineSettings | None = None,
        *,
        kv_type: str = "f16",
        kv_budget: int | None = None,
        layers_on_gpu: str | int = 0,
        in_turns: bool = False,
        logs: bool = False,
    ) -> None:
        self._path = bundle.file(DECODER_NAME)
        self._manifest = bundle.manifest
        self._geometry = bundle.manifest.decoder
        self._engines = engines = engines or untuned(self._geometry.precision)
        self._kv_type = kv_type
        self._kv_budget = kv_budget
        self._flash_attention = flash_mode(engines.flash_attention, kv_type, engines.batch_size)
        self._in_turns = in_turns
        self._closed = False
        self._patience = llama.load(engines.spinning)
        self._api = llama.api()
        llama.set_logs(logs)
        self._n_gpu_layers = gpu_layers(layers_on_gpu, self._api.llama_supports_gpu_offload())
        self._guard = threading.RLock()
        self._n_working = 0
        self.load_seconds = 0.0  # of what was loaded after the vocabulary, until now
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._model: Any = None
        # Freed when closed or forgotten, but never under a context, which keeps a reference.
        self._free: weakref.finalize[..., Decoder] | None = None
        if in_turns:
            vocabulary = self._load(vocab_only=True)
            weakref.finalize(self, self._api.llama_model_free, vocabulary)
        else:
            vocabulary = self._weights()
        self._vocab = self._api.llama_model_get_vocab(vocabulary)
        self._template = self._api.llama_model_chat_template(vocabulary, None)

    @property
    def n_ids(self) -> int:
        """Size of the token table, the ids that are only read included."""
        return int(self._api.llama_vocab_n_tokens(self._vocab))

    @property
    def chat_template(self) -> str:
        """Text of the chat template in the GGUF.

        Raises:
            BundleError: there is none.
        """
        if not self._template:
            raise BundleError(f"{self._path}: has no chat template")
        return bytes(self._template).decode("utf-8", "replace")

    @property
    def identity(self) -> dict[str, Any]:
        """What the numbers in a context's KV cache depend on besides its input."""
        return {
            "decoder": self._manifest.files[DECODER_NAME].sha256,
            "llama.cpp": version("llama-cpp-python"),
            "features": self._api.llama_print_system_info().decode(),
            "gpu_layers": self._n_gpu_layers,
            "kv_type": self._kv_type,
            "flash_attention": self._flash_attention,
            "batch_size": self._engines.batch_size,
            "threads": [self._engines.prefill_threads, self._engines.threads],
            "repack": self._engines.repack,
        }

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of all tokens that may be generated."""
        n = self._geometry.vocab_size
        pieces = [self.piece(token) for token in range(n)] + [b""] * (self.n_ids - n)
        return Vocabulary(pieces)

    def use(self, engines: EngineSettings) -> None:
        """Change the settings for contexts made from now on; ``repack`` and ``mmap`` stay."""
        self._engines = replace(engines, repack=self._engines.repack, mmap=self._engines.mmap)
        self._flash_attention = flash_mode(
            engines.flash_attention, self._kv_type, engines.batch_size
        )

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text: special tokens are neither recognised nor added."""
        data = text.encode("utf-8")
        ids = (self._api.llama_token * (len(data) + 1))()
        n = self._api.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, False)
        if n < 0:
            raise DecoderError("llama.cpp could not tokenize the text")
        return list(ids[:n])

    def piece(self, token: int) -> bytes:
        """Bytes that a token stands for; none for special tokens. May be part of a character."""
        buffer = ctypes.create_string_buffer(256)
        n = self._api.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = self._api.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:n]

    def context(self, n_positions: int) -> Context:
        """A context with room for at least ``n_positions``, which it takes when it is first used.

        Raises:
            DecoderError: the model was closed.
        """
        if self._closed:
            raise DecoderError("the model was closed")
        context = Context(self, n_positions)
        self._contexts.add(context)
        return context

    def close(self) -> None:
        """Free the weights, or leave that to the last context that is still open."""
        self._closed = True
        if not any(context.is_open for context in self._contexts):
            self._unload()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """``release`` does nothing meanwhile, and its threads are patient with each other."""
        with self._guard:
            self._n_working += 1
        n_threads = min(self._engines.threads, self._engines.prefill_threads)
        watching = (
            self._patience.watching(n_threads) if self._patience else contextlib.nullcontext()
        )
        try:
            with watching:
                yield
        finally:
            with self._guard:
                self._n_working -= 1

    def release(self) -> None:
        """Give the weights' memory back until a context needs them; contexts keep their content.

        Nothing happens while a context is at work, and without ``in_turns``.
        """
        with self._guard:
            if self._in_turns and not self._n_working and self._model:
                for context in self._contexts:
                    context._park()
                self._unload()
                give_back_memory()

    def _unload(self) -> None:
        if self._free:
            self._free()
        self._free = self._model = None

    def _weights(self) -> Any:
        with self._guard:
            if self._model is None:
                started = time.perf_counter()
                self._model = model = self._load(vocab_only=False)
                self._free = weakref.finalize(self, self._api.llama_model_free, model)
                self._check_geometry()
                if self._in_turns:
                    self.load_seconds += time.perf_counter() - started
            return self._model

    def _load(self, *, vocab_only: bool) -> Any:
        api = self._api
        params = api.llama_model_default_params()
        params.n_gpu_layers = self._n_gpu_layers
        params.vocab_only = vocab_only
        params.use_extra_bufts = self._engines.repack
        params.load_mode = (
            api.LLAMA_LOAD_MODE_MMAP if self._engines.mmap else api.LLAMA_LOAD_MODE_NONE
        )
        llama.forget_errors()
        model = llama.load_model(self._path, params, mapped=self._engines.mmap)
        if not model:
            raise BundleError(f"{self._path}: llama.cpp cannot load it{llama.because()}")
        return model

    def _check_geometry(self) -> None:
        api, model, geometry = self._api, self._model, self._geometry
        found = {
            "hidden_size": api.llama_model_n_embd(model),
            "n_layers": api.llama_model_n_layer(model),
            "n_heads": api.llama_model_n_head(model),
            "n_kv_heads": api.llama_model_n_head_kv(model),
        }
        expected: dict[str, int] = {name: getattr(geometry, name) for name in found}
        found["vocabulary"] = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        expected["vocabulary"] = geometry.vocab_size + geometry.additional_vocab_size
        for name, value in found.items():
            if value != expected[name]:
                self.close()
                raise BundleError(
                    f"{self._path}: has {name} {value}, the manifest says {expected[name]}"
                )


class Context:
    """One sequence in a KV cache. Not safe for use by two threads at once.

    It is created when it is first used. While its decoder's weights are released, its content is
    parked as bytes.
    """

    def __init__(self, decoder: Decoder, n_positions: int) -> None:
        self._decoder = decoder
        self._api = decoder._api
        self._closed = False
        self._context: Any = None
        self._free: weakref.finalize[..., Context] | None = None
        self._capacity = context_size(n_positions)
        self._parked: UInt8 | None = None
        self._n_parked = 0
        self._room = 0  # positions of the llama.cpp context
        self._flash = False  # whether it is laid out for a prompt alone, see ``_arrange``

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._capacity

    @property
    def n_positions(self) -> int:
        """Positions in use."""
        if self._context is None:
            return self._n_parked
        return 1 + int(self._api.llama_memory_seq_pos_max(self._memory(), 0))

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for the KV cache."""
        return kv_bytes(self.capacity, self._decoder)

    def reserve(self, n_positions: int) -> None:
        """Make room for ``n_positions`` in all; what is cached stays.

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
            n_positions: the first of them; all by default.

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
        return self._fill(self._open(), state)

    def settle(self) -> None:
        """Do now what the first token of an answer would have to wait for."""
        self._arrange()

    def truncate(self, n_positions: int) -> None:
        """Forget everything from position ``n_positions`` on."""
        if self._context is None and n_positions >= self._n_parked:
            return
        self._api.llama_memory_seq_rm(self._memory(), 0, n_positions, -1)

    def append_tokens(self, ids: Sequence[int], **options: Any) -> None:
        """Prefill token ids; options as ``append_embeddings``."""
        self._append(np.asarray(ids, np.int32), **options)

    def append_embeddings(self, rows: Float32, **options: Any) -> None:
        """Prefill rows of shape (n, hidden_size), batch by batch.

        Args:
            rows: decoder input embeddings, float32.
            options: ``logits`` (default false) computes them for the last position, ``cancel``
                stops between two operators, ``progress`` is called with the positions done.

        Raises:
            Cancelled: ``cancel`` was set; the batches done stay cached.
            DecoderError: llama.cpp failed.
        """
        self._append(np.ascontiguousarray(rows, np.float32), **options)

    def forbid(self, ids: npt.NDArray[np.bool_]) -> None:
        """Give those of the ids (vocabulary,) that are set a logit of minus infinity."""
        pointer = self._api.llama_get_logits_ith(self._open(), -1)
        np.ctypeslib.as_array(pointer, (self._decoder.n_ids,))[ids] = -np.inf

    def logits(self) -> Float32:
        """(vocabulary,) float32: scores of the token that follows, a copy."""
        pointer = self._api.llama_get_logits_ith(self._open(), -1)
        logits: Float32 = np.ctypeslib.as_array(pointer, (self._decoder.n_ids,)).copy()
        return logits

    def close(self) -> None:
        """Free the KV cache."""
        self._closed = True
        self._drop()
        self._parked = None
        if self._decoder._closed:
            self._decoder.close()

    @property
    def is_open(self) -> bool:
        """Whether it was not closed yet."""
        return not self._closed

    def _park(self) -> None:
        """Keep the content as bytes and free the context, which refers to the weights."""
        if self._context is not None:
            self._n_parked = self.n_positions
            self._parked = self.state() if self._n_parked else None
            self._drop()

    def _drop(self) -> None:
        if self._free:
            self._free()
        self._free = self._context = None

    def _copy(self, n_positions: int | None = None) -> UInt8:
        """As ``state``, in the present layout."""
        stop = self.n_positions if n_positions is None else n_positions
        return copy_cells(self._api, self._open(), 0, stop)

    def _fill(self, context: Any, state: UInt8) -> bool:
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return bool(self._api.llama_state_seq_set_data(context, data, len(state), 0))

    def _hold(self, context: Any, room: int, flash: bool = False) -> None:
        self._context, self._room, self._flash = context, room, flash
        self._free = weakref.finalize(self, self._api.llama_free, context)

    def _arrange(self, n_rows: int = 0) -> None:
        """Lay the KV cache out for the next ``n_rows`` positions; 0: for an answer.

        With flash attention for prompts alone, a long one gets a context of its own, from which
        the KV cache is moved when something else is asked for. What is in front of it is short,
        and room for the rest is made only then: there are never more than two caches.
        """
        n_cached, room = self.n_positions, self._capacity
        old = self._open() if n_cached else self._context
        flash = self._takes_flash(n_rows, n_cached)
        before_a_picture = self._decoder._flash_attention == "prefill" and 0 < n_rows < FLASH_TILE
        if flash or (before_a_picture and not n_cached):
            room = context_size(n_cached + n_rows)
        needed = n_cached + n_rows if n_rows else room
        if old is not None and flash == self._flash and needed <= self._room:
            return
        new = self._create(room, flash)
        try:
            if n_cached and flash != self._flash:
                move_cells(self._api, old, new, n_cached, self._decoder._geometry.n_layers)
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
        decoder = self._decoder
        if decoder._flash_attention != "prefill":
            return False
        both = self.kv_bytes + kv_bytes(context_size(n_cached + n_rows), decoder)
        if decoder._kv_budget is not None and both > decoder._kv_budget:
            return False
        return n_rows >= FLASH_ROWS and (self._flash or n_rows >= n_cached)

    def _create(self, n_positions: int, flash: bool = False) -> Any:
        """An empty context; with ``flash`` for a prompt alone."""
        decoder, api, engines = self._decoder, self._api, self._decoder._engines
        model = decoder._weights()
        params = api.llama_context_default_params()
        params.n_ctx = n_positions
        params.n_seq_max, params.kv_unified = N_SEQUENCES, True
        # Logits are read for the last position only, but there is room for no fewer than sequences.
        params.n_outputs_max = N_SEQUENCES
        flash_attention, batch_size = decoder._flash_attention, engines.batch_size
        if flash_attention == "prefill":
            flash_attention = "on" if flash else "off"
            if not flash:
                batch_size = min(batch_size, SCORES_BATCH)
        params.n_batch = params.n_ubatch = min(batch_size, params.n_ctx)
        params.n_threads = engines.threads
        params.n_threads_batch = engines.prefill_threads
        params.type_k = params.type_v = llama.ggml_type(decoder._kv_type)
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
        llama.forget_errors()
        context = api.llama_init_from_model(model, params)
        if not context:
            raise DecoderError(f"llama.cpp could not create a context{llama.because()}")
        return context

    def _append(
        self,
        rows: npt.NDArray[Any],
        *,
        logits: bool = False,
        cancel: CancelToken | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._arrange(len(rows))
        api, context = self._api, self._open()
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
                self._decode(rows[start:stop], wanted, cancel)
                if progress:
                    progress(stop)
        finally:
            if cancel:
                api.llama_set_abort_callback(context, llama.never_abort(), None)

    def _decode(
        self, part: npt.NDArray[Any], wanted: npt.NDArray[np.int8], cancel: CancelToken | None
    ) -> None:
        api = self._api
        batch = api.llama_batch()  # no positions, no sequence ids: the next ones of sequence 0
        batch.n_tokens = len(part)
        if part.ndim == 1:
            batch.token = part.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        else:
            batch.embd = part.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        llama.forget_errors()
        result = api.llama_decode(self._open(), batch)
        if result == 0:
            return
        if result == _ABORTED and cancel and cancel.is_set:
            raise Cancelled("stopped while the decoder was working")
        raise DecoderError(f"llama.cpp failed with code {result}{llama.because()}")

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


def kv_bytes(n_positions: int, decoder: Decoder) -> int:
    """Bytes of KV cache for a number of positions."""
    return n_positions * decoder._geometry.kv_bytes_per_token(KV_TYPES[decoder._kv_type])
