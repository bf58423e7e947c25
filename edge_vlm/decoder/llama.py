"""llama.cpp in this process: the library, loaded once, a model's weights, KV caches as bytes.

llama-cpp-python's low-level functions mirror ``llama.h`` of the pinned release.

Without flash attention llama.cpp keeps V transposed, with it as rows; apart from that the KV caches
are the same, bit for bit. The state functions of ``llama.h`` give out the cells of a sequence as
bytes but refuse the other layout, so V is transposed on the way, some cells at a time. The bytes
follow ``llama_kv_cache::state_write``.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.bundle.gguf_check import check_decoder
from edge_vlm.decoder.waiting import Patience
from edge_vlm.errors import BundleError, DecoderError
from edge_vlm.machine import process
from edge_vlm.machine.memory import forget_mapped
from edge_vlm.machine.process import llama_log, long_waits, waits_are_decided
from edge_vlm.machine.providers import gpu_layers

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm.machine.engine_settings import EngineSettings

UInt8 = npt.NDArray[np.uint8]
N_SEQUENCES = 2  # that a context must have room for: the one in use, and the cells on their way
_USED, _MOVING = 0, 1
_FORGET_EVERY = 1 / 32  # of a file that is loaded
_STEP = 128  # positions at a time: little memory, and a layer's V fits a core's cache
_HEAD = 16  # bytes: magic, sequence, streams, cells
_CELL = 12  # position, number of sequences, sequence
_MROPE_CELL = 24  # temporal position, number of sequences, width, height, token, sequence
_TENSOR = 12  # in front of a layer's K or V


def load(spinning: bool) -> Patience | None:
    """Load llama.cpp so that how long its threads wait can be changed, and who changes it.

    None, if they are to spin always or the user has decided. The first call counts: see
    ``patience``.
    """
    if spinning or waits_are_decided():
        return None
    with long_waits():
        import llama_cpp  # noqa: F401 (loaded here for what libgomp reads)
    return _patience()


@cache
def api() -> Any:
    """llama-cpp-python's low-level module with its backend started."""
    import llama_cpp

    module = llama_cpp.llama_cpp
    module.llama_log_set(llama_log, ctypes.c_void_p())
    module.llama_backend_init()
    return module


def build_info() -> tuple[str, bool]:
    """llama.cpp's own description of its build, and whether it can use a GPU."""
    text = api().llama_print_system_info().decode("utf-8", "replace")
    return text, bool(api().llama_supports_gpu_offload())


def ggml_type(name: str) -> int:
    """The number of a tensor type."""
    return int(getattr(api(), f"GGML_TYPE_{name.upper()}"))


def load_model(path: Path, params: Any, *, mapped: bool) -> Any:
    """llama.cpp's model; None if it refuses. What it has read of a ``mapped`` file is let go of.

    Matrices that are interleaved are copied, one after the other; otherwise copies and file would
    count together before the last one is done. llama.cpp works in a thread of its own, because
    Ctrl-C raises in the main thread, and a callback from C cannot pass that on. It ends the load.
    """
    stopped = threading.Event()
    forgotten = -1.0

    def on_progress(done: float, _user_data: object) -> bool:
        nonlocal forgotten
        if mapped and (done == 1 or done >= forgotten + _FORGET_EVERY):
            forgotten = done
            forget_mapped(path)
        return not stopped.is_set()

    params.progress_callback = api().llama_progress_callback(on_progress)
    load, name = api().llama_model_load_from_file, str(path).encode()
    with ThreadPoolExecutor(1) as pool:
        try:
            loading = pool.submit(load, name, params)
        except RuntimeError:  # the main thread has ended, and Ctrl-C with it
            return load(name, params)
        try:
            return loading.result()
        except BaseException:
            stopped.set()
            raise


@cache
def abort_when_set() -> Any:
    """An abort callback without Python in it, for a ``CancelToken``'s buffer.

    llama.cpp asks it before every operator, from its own threads; a Python function would take the
    interpreter's lock thousands of times a second. strlen() of a token's buffer is 0 until the
    token is set and 1 afterwards, which is just what the callback has to answer.
    """
    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return ctypes.cast(libc.strlen, api().ggml_abort_callback)


@cache
def never_abort() -> Any:
    """No abort callback."""
    return api().ggml_abort_callback()


@cache
def _patience() -> Patience:
    return Patience(api()._lib)


def free_with(owner: object, free: Callable[[Any], None], pointer: Any) -> Callable[[], object]:
    """Free something of llama.cpp's with its owner, or when what is returned is called.

    Not at the end of the program, when a thread may still use it, and not in a forked child, whose
    copy of a context has no threads to end.
    """
    made_in = os.getpid()

    def free_here() -> None:
        if os.getpid() == made_in:
            free(pointer)

    finalizer = weakref.finalize(owner, free_here)
    finalizer.atexit = False
    return finalizer


class Weights:
    """A bundle's ``decoder.gguf``: the vocabulary always, the matrices once they are asked for.

    Args:
        bundle: where the file is.
        engines: ``repack``, ``mmap`` and ``spinning`` of them.
        layers_on_gpu: a count, auto or all.
        in_turns: load the matrices when they are asked for; they may be let go of again.
        is_checked: the header of the file was compared with the manifest before.

    Raises:
        BundleError: llama.cpp cannot load it, or it differs from the manifest.
        InputError: a GPU was asked for, and this llama.cpp cannot use one.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: EngineSettings,
        layers_on_gpu: str | int,
        in_turns: bool,
        is_checked: bool = False,
    ) -> None:
        self.path = bundle.decoder_file
        self.geometry = bundle.manifest.decoder
        self.unspoken = bundle.manifest.tokens.unspoken
        self.sha256 = bundle.manifest.files[self.path.name].sha256
        if not is_checked:
            check_decoder(self.path, self.geometry)
        self.repack, self.mmap, self.in_turns = engines.repack, engines.mmap, in_turns
        self.waiting = load(engines.spinning)
        self.api = api()
        self.n_gpu_layers = gpu_layers(layers_on_gpu, self.api.llama_supports_gpu_offload())
        self.load_seconds = 0.0  # of matrices that were loaded after the vocabulary, until now
        self._guard = threading.RLock()
        self._model: Any = None
        # Freed when unloaded or forgotten, but never under a context, which keeps a reference.
        self._free: Callable[[], object] | None = None
        self._closed = False
        if self.n_gpu_layers:
            process.note_work()
        if in_turns:
            vocabulary = self._load(vocab_only=True)
            free_with(self, self.api.llama_model_free, vocabulary)
        else:
            vocabulary = self.model()
        # A token of M-RoPE has three positions: temporal, height and width.
        kinds = self.api.LLAMA_ROPE_TYPE_MROPE, self.api.LLAMA_ROPE_TYPE_IMROPE
        self.has_mrope: bool = self.api.llama_model_rope_type(vocabulary) in kinds
        self._vocab = self.api.llama_model_get_vocab(vocabulary)
        self.template = self.api.llama_model_chat_template(vocabulary, None)

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary.

        Raises:
            DecoderError: it was freed.
        """
        if self._closed:
            raise DecoderError("the model was closed")
        return self._vocab

    @property
    def n_ids(self) -> int:
        """Size of the token table, the ids that are only read included."""
        return int(self.api.llama_vocab_n_tokens(self.vocab))

    @property
    def is_loaded(self) -> bool:
        """Whether the matrices are in memory."""
        return self._model is not None

    def model(self) -> Any:
        """llama.cpp's model with its matrices, loaded unless it is there.

        Raises:
            BundleError: as for the class.
            DecoderError: it was freed for good.
        """
        with self._guard:
            if self._closed:
                raise DecoderError("the model was closed")
            if self._model is None:
                started = time.perf_counter()
                self._model = model = self._load(vocab_only=False)
                self._free = free_with(self, self.api.llama_model_free, model)
                self._check_geometry()
                if self.in_turns:
                    self.load_seconds += time.perf_counter() - started
            return self._model

    def unload(self) -> None:
        """Free the matrices."""
        with self._guard:
            if self._free:
                self._free()
            self._free = self._model = None

    def close(self) -> None:
        """Free the matrices for good."""
        with self._guard:
            self._closed = True
            self.unload()

    def _load(self, *, vocab_only: bool) -> Any:
        api = self.api
        params = api.llama_model_default_params()
        params.n_gpu_layers = self.n_gpu_layers
        params.vocab_only = vocab_only
        params.use_extra_bufts = self.repack
        params.load_mode = api.LLAMA_LOAD_MODE_MMAP if self.mmap else api.LLAMA_LOAD_MODE_NONE
        process.forget_errors()
        model = load_model(self.path, params, mapped=self.mmap)
        if not model:
            raise BundleError(f"{self.path}: llama.cpp cannot load it{process.because()}")
        return model

    def _check_geometry(self) -> None:
        api, model, geometry = self.api, self._model, self.geometry
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
                self.unload()
                raise BundleError(
                    f"{self.path}: has {name} {value}, the manifest says {expected[name]}"
                )


def move_cells(weights: Weights, source: Any, target: Any, stop: int) -> None:
    """Copy what stands in front of position ``stop`` into an empty context.

    Args:
        weights: of the model.
        source: a context; what it holds stays.
        target: a context of the same KV-cache type, where V is laid out in the other way.
        stop: a position, the temporal one with M-RoPE.

    Raises:
        DecoderError: llama.cpp failed, or lays its state out in another way.
    """
    api, n_layers = weights.api, weights.geometry.n_layers
    theirs = api.llama_get_memory(target)
    buffer = np.empty(0, np.uint8)
    for start in range(0, stop, _STEP):
        state = copy_cells(api, source, start, min(start + _STEP, stop), buffer)
        buffer = max(buffer, state, key=len)
        n_cells = int(state[12:_HEAD].view(np.uint32)[0])
        if not n_cells:  # behind a picture with fewer cells in a row than positions
            continue
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        transpose_values(state, n_cells, n_layers, has_mrope=weights.has_mrope)
        if not api.llama_state_seq_set_data(target, data, len(state), _MOVING):
            raise DecoderError("llama.cpp could not move the KV cache to another context")
        api.llama_memory_seq_cp(theirs, _MOVING, _USED, -1, -1)
        api.llama_memory_seq_rm(theirs, _MOVING, -1, -1)


def copy_cells(api: Any, context: Any, start: int, stop: int, buffer: UInt8 | None = None) -> UInt8:
    """The state of positions ``start`` to ``stop`` alone, in ``buffer`` if that is large enough;
    with M-RoPE, temporal ones.

    Raises:
        DecoderError: llama.cpp failed.
    """
    memory = api.llama_get_memory(context)
    api.llama_memory_seq_cp(memory, _USED, _MOVING, start, stop)
    try:
        size = int(api.llama_state_seq_get_size(context, _MOVING))
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
        state = buffer[:size]
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if api.llama_state_seq_get_data(context, data, size, _MOVING) != size:
            raise DecoderError("llama.cpp could not copy the KV cache")
    finally:
        api.llama_memory_seq_rm(memory, _MOVING, -1, -1)
    return state


def cell_positions(state: UInt8, has_mrope: bool) -> tuple[list[int], int]:
    """(Temporal) positions of the cells in a sequence's state, in order, and the next position.

    Raises:
        DecoderError: the state is laid out in another way.
    """
    n_cells = int(state[12:_HEAD].view(np.uint32)[0])
    size = _MROPE_CELL if has_mrope else _CELL
    _expect(len(state) >= _HEAD + size * n_cells)
    cells = state[_HEAD : _HEAD + size * n_cells].view(np.int32).reshape(n_cells, size // 4)
    _expect((cells[:, 1] == 1).all())
    temporal, others = cells[:, 0], cells[:, 2:4] if has_mrope else cells[:, :1]
    last = max(int(temporal.max(initial=-1)), int(others.max(initial=-1)))
    return sorted(temporal.tolist()), last + 1


def transpose_values(state: UInt8, n_cells: int, n_layers: int, *, has_mrope: bool = False) -> None:
    """Turn a state with V as rows into one with V transposed, or the other way round, in place.

    Args:
        state: bytes of one sequence.
        n_cells: in it.
        n_layers: of the model.
        has_mrope: whether it is one with M-RoPE.

    Raises:
        DecoderError: the state is laid out in another way.
    """
    position = _HEAD + (_MROPE_CELL if has_mrope else _CELL) * n_cells
    _expect(len(state) > position + 8 and state[12:_HEAD].view(np.uint32)[0] == n_cells)
    transposed, layers = state[position : position + 8].view(np.uint32)
    _expect(transposed in (0, 1) and layers == n_layers)
    state[position : position + 4].view(np.uint32)[0] = 1 - transposed
    position += 8
    # What is left is K and V of all layers, which are equally long.
    length, rest = divmod(len(state) - position, 2 * n_layers)
    row_bytes, odd = divmod(length - _TENSOR, n_cells)
    _expect(rest == 0 and odd == 0 and row_bytes > 0)
    for layer in range(n_layers):
        key = state[position + layer * length :][:length]
        value = state[position + (n_layers + layer) * length :][:length]
        kind = key[:4].view(np.int32)[0]
        _expect(key[4:_TENSOR].view(np.uint64)[0] == row_bytes)
        _expect(value[:4].view(np.int32)[0] == kind and kind in (0, 1))
        element = 2 if kind else 4  # GGML_TYPE_F16, GGML_TYPE_F32
        width = row_bytes // element
        sizes, row = value[4:_TENSOR].view(np.uint32), value[4:_TENSOR].view(np.uint64)
        if transposed:
            _expect(sizes[0] == element and sizes[1] == width)
            row[0] = row_bytes
        else:
            _expect(row[0] == row_bytes)
            sizes[:] = element, width
        numbers = value[_TENSOR:].view(np.uint16 if kind else np.uint32)
        rows, columns = (width, n_cells) if transposed else (n_cells, width)
        numbers[:] = numbers.reshape(rows, columns).T.copy().reshape(-1)


def _expect(condition: object) -> None:
    if not condition:
        raise DecoderError("this llama.cpp lays its KV cache out in a way that is not known here")
