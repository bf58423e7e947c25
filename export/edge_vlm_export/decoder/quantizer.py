"""Smaller types for the decoder's weights, through llama.cpp's own quantizer.

A type such as q4_k_m is a mixture: llama.cpp gives single tensors more bits by its own rules, and
another type to tensors whose width the wanted one does not divide. What was written is therefore
read back from the file.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edge_vlm.decoder.llama import api
from edge_vlm.errors import EdgeVLMError, InputError
from edge_vlm.machine.child import call_apart
from edge_vlm.machine.process import because, forget_errors

TENSOR_TYPES = ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_xs", "f16", "bf16", "f32")
MAX_BUFFER_BYTES = 256 << 20  # rows that the quantizer holds at once
_POLL_SECONDS = 0.2

# Mixtures of llama.cpp: their mean bits a weight in the blocks.
MIXTURES: Mapping[str, float] = {
    "q4_k_m": 4.9,
    "q4_0": 4.55,
    "q5_k_m": 5.75,
    "q6_k": 6.6,
    "q8_0": 8.5,
    "iq4_xs": 4.4,
}
# What stands in for a type whose block does not divide a width (as in llama.cpp); else f16.
_NARROWER = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}


def head_types(
    tied: bool, width: int, head: str | None, embedding: str | None
) -> tuple[str | None, str | None]:
    """Types to ask for the output head and the token table; None leaves it to llama.cpp.

    A tied head is the token table, so the one type holds for both. A type that does not divide the
    width gives way as llama.cpp's rules have it: asked for outright, it would end the process.

    Raises:
        InputError: two different types for one table.
    """
    if tied:
        if head and embedding and head != embedding:
            raise InputError(
                "decoder-head and decoder-embedding: this model's head is its token table;"
                " give one type"
            )
        head = embedding = head or embedding
    return _fitting(head, width), _fitting(embedding, width)


def _fitting(kind: str | None, width: int) -> str | None:
    while kind and width % gguf.GGML_QUANT_SIZES[_ggml_type(kind)][0]:
        kind = _NARROWER.get(kind, "f16")
    return kind


def type_bits(kind: str) -> float:
    """Bits of a value, its share of a block's scales included."""
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[_ggml_type(kind)]
    return float(8 * n_bytes / n_values)


def _ggml_type(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind.upper()]


def quantized_bytes(kind: str, n_values: int, n_table: int) -> int:
    """About how large the file gets; ``n_table`` of the values are token table and head."""
    bits = MIXTURES[kind]
    return math.ceil(((n_values - n_table) * bits + n_table * max(bits, 8.5)) / 8)


def quantize_decoder(
    source: Path,
    target: Path,
    kind: str,
    *,
    threads: int,
    head: str | None = None,
    embedding: str | None = None,
    imatrix: Path | None = None,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write the GGUF ``source`` as ``target`` in the types of ``kind``.

    Args:
        source: f32, f16 or bf16.
        target: the GGUF to write.
        kind: a key of ``MIXTURES``.
        threads: of the quantizer.
        head: type of the output head, see ``head_types``.
        embedding: type of the token table.
        imatrix: an ``.npz`` with what ``Reference.importance`` found.
        progress: called with the bytes written so far.

    Raises:
        EdgeVLMError: llama.cpp failed; ``target`` may be there in part.
    """
    call_apart(
        f"{__name__}:quantize_here",
        lambda done, _: progress(done),
        source=str(source),
        target=str(target),
        kind=kind,
        threads=threads,
        output_tensor_type=head,
        token_embedding_type=embedding,
        imatrix=str(imatrix) if imatrix else None,
    )


def quantize_here(
    progress: Callable[[int, int], None],
    *,
    source: str,
    target: str,
    kind: str,
    threads: int,
    imatrix: str | None,
    **types: str | None,
) -> None:
    """``quantize_decoder`` in this process; progress is read off the growing file."""
    llama_cpp = api()
    forget_errors()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.max_buf_size = MAX_BUFFER_BYTES
    for key, wanted in types.items():
        if wanted:
            setattr(params, key, _ggml_type(wanted))
    entries = _imatrix_entries(llama_cpp, imatrix) if imatrix else None
    if entries is not None:
        params.imatrix = entries
    result: list[int] = []
    thread = threading.Thread(
        target=lambda: result.append(
            llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
        )
    )
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        written = Path(target)
        if written.exists():
            progress(written.stat().st_size, 0)
    if result != [0]:
        raise EdgeVLMError(f"llama.cpp could not quantize the decoder{because()}")


def _imatrix_entries(llama_cpp: Any, path: str) -> Any:
    """The array of names and values that llama.cpp reads, ended by an entry without a name."""
    with np.load(path) as arrays:
        values = {name: np.ascontiguousarray(arrays[name], np.float32) for name in arrays.files}
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, array) in zip(entries, values.items(), strict=False):
        entry.name = name.encode()
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = array.size
    entries.arrays = list(values.values())  # keeps them alive as long as the entries
    return entries
