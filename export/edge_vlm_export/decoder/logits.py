"""llama.cpp as the exporter needs it: the vocabulary alone, and the logits of many positions."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.decoder.llama import api, load_model
from edge_vlm.errors import EdgeVLMError
from edge_vlm.machine.process import because, forget_errors, hearing_llama

Float32 = npt.NDArray[np.float32]
BATCH_POSITIONS = 128  # bounds the logits held at once: 78 MB with the released vocabulary


@contextmanager
def loaded(path: Path, *, vocab_only: bool) -> Iterator[Any]:
    """A model of llama.cpp.

    Raises:
        EdgeVLMError: it does not load.
    """
    with hearing_llama():
        params = api().llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0
        forget_errors()
        model = load_model(path, params, mapped=False)
    if not model:
        raise EdgeVLMError(f"llama.cpp cannot load {path.name}{because()}")
    try:
        yield model
    finally:
        api().llama_model_free(model)


class Run:
    """A context that computes whole prompts, with the runtime's settings."""

    def __init__(self, model: Any, n_positions: int, threads: int) -> None:
        self._api = llama_cpp = api()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_positions
        params.n_batch = params.n_ubatch = params.n_outputs_max = BATCH_POSITIONS
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._n_ids = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        forget_errors()
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise EdgeVLMError(f"llama.cpp could not create a context{because()}")

    def close(self) -> None:
        """Free the KV cache."""
        self._api.llama_free(self._context)

    def logits(
        self,
        ids: npt.NDArray[np.int32],
        rows: Float32,
        wanted: npt.NDArray[np.bool_],
        positions: npt.NDArray[np.int32] | None = None,
    ) -> Iterator[tuple[int, Float32]]:
        """Compute a prompt from its beginning; yields each wanted position with its logits.

        Args:
            ids: (n,) token ids, negative where the next of ``rows`` goes in.
            rows: (n_rows, hidden_size) embeddings.
            wanted: (n,) whether logits are wanted.
            positions: (n, 3) with M-RoPE.

        Raises:
            EdgeVLMError: llama.cpp failed.
        """
        api, context = self._api, self._context
        api.llama_memory_seq_rm(api.llama_get_memory(context), 0, 0, -1)
        n_rows = 0
        for start, stop in _batches(ids):
            batch = api.llama_batch()  # positions follow those in the cache
            batch.n_tokens = stop - start
            if ids[start] < 0:
                part: npt.NDArray[Any] = np.ascontiguousarray(rows[n_rows : n_rows + stop - start])
                n_rows += stop - start
                batch.embd = part.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            else:
                part = np.ascontiguousarray(ids[start:stop], np.int32)
                batch.token = part.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            if positions is not None:  # planes of three and nothing; of ids, one is enough
                at = positions[start:stop].T
                planes = np.concatenate((at, 0 * at[:1])) if ids[start] < 0 else at[0]
                planes = np.ascontiguousarray(planes, np.int32)
                batch.pos = planes.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            flags = wanted[start:stop].astype(np.int8)
            batch.logits = flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
            if code := api.llama_decode(context, batch):
                raise EdgeVLMError(f"llama.cpp failed with code {code} on a calibration prompt")
            for index in np.flatnonzero(flags):
                pointer = api.llama_get_logits_ith(context, int(index))
                yield start + int(index), np.ctypeslib.as_array(pointer, (self._n_ids,)).copy()


def _batches(ids: npt.NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Ends of the pieces that have either ids or embeddings alone."""
    for begin, end in pairwise([0, *(np.flatnonzero(np.diff(ids < 0)) + 1), len(ids)]):
        for start in range(begin, end, BATCH_POSITIONS):
            yield start, min(start + BATCH_POSITIONS, end)
