"""Smaller types for the decoder's weights, through llama.cpp's own quantizer.

A type such as q4_k_m is a mixture: llama.cpp gives single tensors more bits by its own rules, and
another type to tensors whose width the wanted one does not divide. What was written is therefore
read back from the file.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.decoder.llama import api
from edge_vlm.errors import EdgeVLMError, InputError
from edge_vlm.machine.child import call_apart
from edge_vlm.machine.process import because, forget_errors

TENSOR_TYPES = ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_xs", "f16", "bf16", "f32")
MAX_BUFFER_BYTES = 256 << 20  # rows that the quantizer holds at once
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Mixture:
    """One choice of ``--decoder``: its file type, and its mean bits a weight in the blocks."""

    file_type: str
    bits: float


MIXTURES: Mapping[str, Mixture] = {
    "q4_k_m": Mixture("LLAMA_FTYPE_MOSTLY_Q4_K_M", 4.9),
    "q4_0": Mixture("LLAMA_FTYPE_MOSTLY_Q4_0", 4.55),
    "q5_k_m": Mixture("LLAMA_FTYPE_MOSTLY_Q5_K_M", 5.75),
    "q6_k": Mixture("LLAMA_FTYPE_MOSTLY_Q6_K", 6.6),
    "q8_0": Mixture("LLAMA_FTYPE_MOSTLY_Q8_0", 8.5),
    "iq4_xs": Mixture("LLAMA_FTYPE_MOSTLY_IQ4_XS", 4.4),
}
# Values in a block, and the type for widths that are no multiple of it (as in llama.cpp).
_BLOCKS = {"q4_k": (256, "q5_0"), "q5_k": (256, "q5_1"), "q6_k": (256, "q8_0")}
_BLOCKS |= {"iq4_xs": (256, "iq4_nl"), "q4_0": (32, "f16"), "q8_0": (32, "f16")}


@dataclass(frozen=True)
class Stored:
    """One tensor of a written GGUF."""

    name: str
    type: str  # lower case, such as q4_k
    n_values: int
    n_bytes: int


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
    if kind is None:
        return None
    for _ in range(2):
        block, other = _BLOCKS.get(kind, (32 if kind.startswith(("q5", "iq4_nl")) else 1, "f16"))
        if width % block == 0:
            break
        kind = other
    return kind


def quantized_bytes(kind: str, n_values: int, n_table: int) -> int:
    """About how large the file gets; ``n_table`` of the values are token table and head."""
    bits = MIXTURES[kind].bits
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
    """Write ``source`` (f32, f16 or bf16) as ``target`` in the types of ``kind``.

    Args:
        source: a GGUF.
        target: the GGUF to write.
        kind: a key of ``MIXTURES``.
        threads: threads of the quantizer.
        head: type of the output head, see ``head_types``.
        embedding: type of the token table.
        imatrix: an ``.npz`` with an array of float32 for each tensor, see ``imatrix``.
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
        head=head,
        embedding=embedding,
        imatrix=str(imatrix) if imatrix else None,
    )


def quantize_here(
    progress: Callable[[int, int], None],
    *,
    source: str,
    target: str,
    kind: str,
    threads: int,
    head: str | None,
    embedding: str | None,
    imatrix: str | None,
) -> None:
    """``quantize_decoder`` in this process; progress is read off the growing file."""
    import gguf

    llama_cpp = api()
    forget_errors()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, MIXTURES[kind].file_type)
    params.max_buf_size = MAX_BUFFER_BYTES
    if head:
        params.output_tensor_type = gguf.GGMLQuantizationType[head.upper()]
    if embedding:
        params.token_embedding_type = gguf.GGMLQuantizationType[embedding.upper()]
    entries = _imatrix_entries(llama_cpp, imatrix)
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


def _imatrix_entries(llama_cpp: Any, path: str | None) -> Any:
    """The array of names and values that llama.cpp reads, ended by an entry without a name."""
    if path is None:
        return None
    with np.load(path) as arrays:
        values = {name: np.ascontiguousarray(arrays[name], np.float32) for name in arrays.files}
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, array) in zip(entries, values.items(), strict=False):
        entry.name = name.encode()
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = array.size
    entries.arrays = list(values.values())  # keeps them alive as long as the entries
    return entries


def stored_tensors(path: Path) -> list[Stored]:
    """The tensors of a GGUF with their types and sizes.

    Raises:
        EdgeVLMError: it cannot be read.
    """
    import gguf

    try:
        tensors: Sequence[Any] = gguf.GGUFReader(path).tensors
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise EdgeVLMError(f"{path}: cannot be read back ({error})") from error
    return [
        Stored(t.name, t.tensor_type.name.lower(), int(t.n_elements), int(t.n_bytes))
        for t in tensors
    ]


def save_imatrix(path: Path, values: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write an importance matrix where ``quantize_decoder`` reads it."""
    with path.open("wb") as file:
        np.savez(file, **values)  # type: ignore[arg-type]  # the stubs want keywords of their own
