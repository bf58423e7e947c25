"""A KV cache as bytes: moved to a context that lays V out differently, and kept on disk.

Without flash attention llama.cpp keeps V transposed, with it as rows; apart from that the caches
are the same, bit for bit. The state functions of ``llama.h`` give out the cells of a sequence as
bytes but refuse the other layout, so V is transposed on the way, some cells at a time. The bytes
follow ``llama_kv_cache::state_write`` of the pinned release.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import DecoderError
from edge_vlm.machine.store import Entry, Store, make_key
from edge_vlm.prompt.builder import picture_ends

if TYPE_CHECKING:
    from edge_vlm.engines import Context

UInt8 = npt.NDArray[np.uint8]
N_SEQUENCES = 2  # that a context must have room for: the one in use, and the cells on their way
_USED, _MOVING = 0, 1
_STEP = 128  # cells at a time: little memory, and a layer's V fits a core's cache
_HEAD = 16  # bytes: magic, sequence, streams, cells
_CELL = 12  # position, number of sequences, sequence
_TENSOR = 12  # in front of a layer's K or V


def move_cells(api: Any, source: Any, target: Any, n_cells: int, n_layers: int) -> None:
    """Copy the first ``n_cells`` positions into an empty context.

    Args:
        api: llama-cpp-python's low-level module.
        source: a context; what it holds stays.
        target: a context of the same model and KV-cache type.
        n_cells: positions.
        n_layers: of the model.

    Raises:
        DecoderError: llama.cpp failed, or lays its state out in another way.
    """
    theirs = api.llama_get_memory(target)
    buffer = np.empty(0, np.uint8)
    for start in range(0, n_cells, _STEP):
        stop = min(start + _STEP, n_cells)
        state = copy_cells(api, source, start, stop, buffer)
        buffer = max(buffer, state, key=len)
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        transpose_values(state, stop - start, n_layers)
        if not api.llama_state_seq_set_data(target, data, len(state), _MOVING):
            raise DecoderError("llama.cpp could not move the KV cache to another context")
        api.llama_memory_seq_cp(theirs, _MOVING, _USED, -1, -1)
        api.llama_memory_seq_rm(theirs, _MOVING, -1, -1)


def copy_cells(api: Any, context: Any, start: int, stop: int, buffer: UInt8 | None = None) -> UInt8:
    """The state of positions ``start`` to ``stop`` alone, in ``buffer`` if that is large enough.

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


def transpose_values(state: UInt8, n_cells: int, n_layers: int) -> None:
    """Turn a state with V as rows into one with V transposed, or the other way round, in place.

    Args:
        state: bytes of one sequence.
        n_cells: in it.
        n_layers: of the model.

    Raises:
        DecoderError: the state is laid out in another way.
    """
    position = _HEAD + _CELL * n_cells
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


_KIND = "prefix"


class PrefixCache:
    """Prefixes of prompts, each ending with a picture.

    Prompts are given as in ``positions``: ids, one an input position, where -1 - i stands for
    picture i, whose content is ``digests[i]``.

    Args:
        store: where they are kept.
        identity: what a KV cache depends on besides the prompt, see ``Decoder.identity``.
    """

    def __init__(self, store: Store, identity: Mapping[str, Any]) -> None:
        self._store = store
        self._identity = dict(identity)

    def restore(self, context: Context, ids: Sequence[int], digests: Sequence[bytes]) -> int:
        """Fill an empty context with the longest prefix that is kept; returns its positions."""
        for end in reversed(picture_ends(ids)):
            if end == len(ids):
                continue  # the logits of the last position are not kept
            key = self._key(ids[:end], digests)
            state = self._store.read(_KIND, key)
            if state is None:
                continue
            if context.set_state(state) and context.n_positions == end:
                return end
            self._store.drop(_KIND, key)
            context.truncate(0)
        return 0

    def keep(self, context: Context, ids: Sequence[int], digests: Sequence[bytes]) -> None:
        """Keep the context's first positions, which are those of the prompt ``ids``."""
        state = context.state(len(ids))
        self._store.write_soon([Entry(_KIND, self._key(ids, digests), state)])

    def _key(self, ids: Sequence[int], digests: Sequence[bytes]) -> bytes:
        used = sorted({-1 - value for value in ids if value < 0})
        return make_key(
            self._identity,
            np.array(ids, np.int32).tobytes(),
            *(digests[index] for index in used),
        )
