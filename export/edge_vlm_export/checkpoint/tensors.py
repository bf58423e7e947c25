"""The tensors of a checkpoint: safetensors files, memory-mapped one tensor at a time.

Format: https://github.com/huggingface/safetensors - eight bytes with the header's length, a JSON
header with dtype, shape and byte range of each tensor, then the bytes. The reader is written out
here because every tensor gets a mapping of its own, which is dropped after use: with one mapping
for the whole file the resident memory would grow to the size of the checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.bundle.json_text import decode, shorten
from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.config_file import (
    MAX_JSON_BYTES,
    Part,
    check_is_itself,
    missing,
    parse_object,
    read_part,
)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 1 << 17
BLOCK_VALUES = 1 << 24  # values converted at a time: 64 MiB of float32

Float32 = npt.NDArray[np.float32]
Shape = tuple[int, ...]
Convert = Callable[[Float32], npt.NDArray[Any]]
Rename = Callable[[str], "str | None"]

_STORED: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32
}
_SAVE = "load it with transformers and save it with save_pretrained(..., safe_serialization=True)"
# Weights that are no safetensors; PyTorch's files hold a program, which is not run.
_OTHER_WEIGHTS = (
    (r"adapter_model\..*", "an adapter and no model; export its base with --adapter"),
    (r"global_step.*|zero_to_fp32\.py", "DeepSpeed's; `python zero_to_fp32.py . OUT` joins them"),
    (r".*\.distcp|pytorch_model_fsdp.*", "FSDP's; `accelerate merge-weights` joins them"),
    (r".*\.(bin|bin\.index\.json|pth?|ckpt)", f"a program runs when it is read; {_SAVE}"),
    (r".*\.(h5|msgpack)", f"another library's; {_SAVE}"),
    (r".*\.(gguf|onnx)", "it was converted; export the checkpoint that it was made from"),
)
# Of tensors that mean nothing, such as the positions 0, 1, 2, ... of older vision towers.
_SKIPPED: Mapping[str, np.dtype[Any]] = {"I64": np.dtype("<i8")}
_SIZES = {name: kind.itemsize for name, kind in (*_STORED.items(), *_SKIPPED.items())}
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")


@dataclass(frozen=True)
class Values:
    """Float32 values that are read when asked for: of a tensor, of some rows of it, or of several.

    ``blocks`` yields them along the first axis, in order and in pieces of bounded size.
    """

    shape: Shape
    blocks: Callable[[], Iterator[Float32]]

    def read(
        self, kind: npt.DTypeLike = np.float32, convert: Convert = lambda block: block
    ) -> npt.NDArray[Any]:
        """All values, of shape ``self.shape``; each block converted to values of ``kind``."""
        out = np.empty(self.shape, kind)
        start = 0
        for block in self.blocks():
            out[start : start + len(block)] = convert(block)
            start += len(block)
        assert start == self.shape[0]  # noqa: S101
        return out

    def flat(self) -> Values:
        """One row for each along the first axis, as a convolution over patches is a product."""
        shape = (self.shape[0], math.prod(self.shape[1:]))
        return Values(shape, lambda: (block.reshape(-1, shape[1]) for block in self.blocks()))

    def scaled(self, factors: Values) -> Values:
        """Each row multiplied with one of ``factors`` (rows,), as a LayerScale does."""

        def blocks() -> Iterator[Float32]:
            values = self.read()
            values *= factors.read().reshape(-1, *[1] * (len(self.shape) - 1))
            yield values

        return Values(self.shape, blocks)

    def interleaved(self, n_heads: int) -> Values:
        """Rows of each head in the order that rotates neighbours and not halves, as llama.cpp does.

        (heads, 2, half) becomes (heads, half, 2).
        """

        def blocks() -> Iterator[Float32]:
            halves = self.read().reshape(n_heads, 2, -1, *self.shape[1:])
            yield np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(self.shape)

        return Values(self.shape, blocks)


def stacked(*parts: Values) -> Values:
    """The rows of several, one after the other."""
    rows = sum(part.shape[0] for part in parts)
    return Values(
        (rows, *parts[0].shape[1:]), lambda: (block for part in parts for block in part.blocks())
    )


@dataclass(frozen=True)
class Tensor:
    """One stored tensor; its values are read when asked for and always come as float32."""

    name: str
    dtype: str
    shape: Shape
    path: Path
    offset: int

    def values(self, start: int = 0, stop: int | None = None) -> Values:
        """Rows ``start`` to ``stop``, by default all."""
        n_rows = (self.shape[0] if stop is None else stop) - start
        return Values((n_rows, *self.shape[1:]), lambda: self.blocks(start, stop))

    def read(self) -> Float32:
        """All values, of shape ``self.shape``."""
        return self.values().read()

    def blocks(
        self, start: int = 0, stop: int | None = None, n_values: int = BLOCK_VALUES
    ) -> Iterator[Float32]:
        """The same rows in pieces of at most ``n_values``, or of one row."""
        stop = self.shape[0] if stop is None else stop
        step = max(1, n_values // max(1, math.prod(self.shape[1:])))
        for first in range(start, stop, step):
            yield self.rows(first, min(first + step, stop))

    def rows(self, start: int, stop: int) -> Float32:
        """Values ``start`` to ``stop`` along the first axis.

        Raises:
            CheckpointError: the file cannot be read, or a value is infinite or not a number.
        """
        row_shape = self.shape[1:]
        itemsize = _STORED[self.dtype].itemsize
        offset = self.offset + start * math.prod(row_shape) * itemsize
        try:
            stored = np.memmap(
                self.path, _STORED[self.dtype], "r", offset, (stop - start, *row_shape)
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot read {self.name} ({error})") from error
        if self.dtype == "BF16":
            values = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            values = np.array(stored, dtype=np.float32, subok=False)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.path}: {self.name} has a value that is infinite or not a number"
            )
        return np.asarray(values)


class Checkpoint:
    """The tensors of a checkpoint by name; only headers were read so far."""

    def __init__(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        self.tensors = tensors
        self.where = where  # the weights file, or the index of several

    @classmethod
    def open(cls, folder: Path, rename: Rename = lambda name: name) -> Checkpoint:
        """Read the headers of ``model.safetensors``, or of all files its index names.

        ``rename`` gives a stored tensor the name it goes by here; None leaves it out.

        Raises:
            CheckpointError: a file is missing, cut off or malformed, or the index is, or two
                tensors go by one name.
        """
        where, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
        if where.exists():
            _check_one_model(where, index)
            stored = read_tensors(where)
        elif index.exists():
            stored, where = _read_shards(index), index
        else:
            there = [path.name for path in folder.iterdir()]
            raise CheckpointError(f"{folder}: {no_weights(there)}")
        tensors: dict[str, Tensor] = {}
        for tensor in stored.values():
            name = rename(tensor.name)
            if name in tensors:
                names = f"{shorten(tensors[name].name)} and {shorten(tensor.name)}"
                raise CheckpointError(f"{where}: tensors {names} are one and the same")
            if name is not None:
                if tensor.dtype not in _STORED:
                    raise _unsupported(tensor.path, tensor.name, tensor.dtype)
                tensors[name] = tensor
        return cls(tensors, where)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def values(self, name: str, start: int = 0, stop: int | None = None) -> Values:
        """Rows ``start`` to ``stop`` of a tensor, by default all."""
        return self.tensors[name].values(start, stop)

    def check(self, required: Mapping[str, Shape], optional: Mapping[str, Shape]) -> None:
        """Compare names and shapes with those the config asks for.

        Raises:
            CheckpointError: a required tensor is missing, a shape differs, or there is a tensor
                that the model does not have.
        """
        for name, shape in required.items():
            if name not in self.tensors:
                raise CheckpointError(f"{self.where}: has no tensor {name} of shape {list(shape)}")
        for name, tensor in self.tensors.items():
            expected = required.get(name) or optional.get(name)
            if expected is None:
                raise CheckpointError(
                    f"{tensor.path}: tensor {shorten(tensor.name)} of shape {list(tensor.shape)} is"
                    " not part of the model that config.json describes"
                )
            if tensor.shape != expected:
                raise CheckpointError(
                    f"{tensor.path}: tensor {shorten(tensor.name)} has shape {list(tensor.shape)},"
                    f" config.json asks for {list(expected)}"
                )


class Index(Part):
    """``model.safetensors.index.json``: which file has which tensor."""

    weight_map: dict[str, Any]


def no_weights(names: Collection[str]) -> str:
    """What is to be said of a folder with these files, none of which an export can read."""
    for pattern, advice in _OTHER_WEIGHTS:
        found = sorted(name for name in names if re.fullmatch(pattern, name))
        if found:
            return f"has no {WEIGHTS_NAME} but {found[0]}: {advice}"
    return f"has neither {WEIGHTS_NAME} nor {INDEX_NAME}"


def _check_one_model(weights: Path, index: Path) -> None:
    """An index beside ``model.safetensors`` may not name other files that are there as well."""
    if not index.exists():
        return
    names = set(map(str, read_part(Index, index, MAX_HEADER_BYTES).weight_map.values()))
    others = [name for name in sorted(names - {weights.name}) if (index.parent / name).exists()]
    if others:
        raise CheckpointError(
            f"{weights}: is there, and {index.name} names {others[0]}, which is there too: remove"
            " the weights that are not meant"
        )


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_part(Index, index, MAX_HEADER_BYTES).weight_map
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{index}: names more than {MAX_TENSORS} tensors")
    for name in weight_map.values():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"{index}: weight_map names {shorten(name)}, which is not the plain name of a"
                " safetensors file beside it"
            )
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        for tensor in read_tensors(index.parent / name).values():
            if weight_map.get(tensor.name) != name:
                raise CheckpointError(
                    f"{tensor.path}: has tensor {shorten(tensor.name)},"
                    f" which {index.name} does not place there"
                )
            tensors[tensor.name] = tensor
    for tensor_name, shard in weight_map.items():
        if tensor_name not in tensors:
            raise CheckpointError(
                f"{index.parent / shard}: lacks tensor {shorten(tensor_name)},"
                f" which {index.name} places there"
            )
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Descriptions of the tensors in one safetensors file, their ranges checked.

    Raises:
        CheckpointError: the file is missing, cut off or malformed.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file")
        file_size = path.stat().st_size
        with path.open("rb") as file:
            check_is_itself(path, file.read(80))
            file.seek(0)
            length_bytes = file.read(8)
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) < 8 or length > file_size - 8:
                if length_bytes[:1] == b"{" and file_size < MAX_JSON_BYTES:  # what a server says
                    parse_object(decode(length_bytes + file.read(), path, CheckpointError), path)
                raise CheckpointError(
                    f"{path}: is cut off or no safetensors file: {file_size} bytes do not hold"
                    " its header"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: its header is larger than {MAX_HEADER_BYTES >> 20} MiB"
                )
            raw = file.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {missing(path)}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    entries = parse_object(decode(raw, f"{path}: its header", CheckpointError), path)
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{path}: has more than {MAX_TENSORS} tensors")
    tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: its tensors overlap or leave gaps")
        end += math.prod(tensor.shape) * _SIZES[tensor.dtype]
    if end != file_size:
        problem = "is cut off" if file_size < end else "has bytes after its tensors"
        raise CheckpointError(f"{path}: {problem}: {file_size} bytes, its header tells {end}")
    return tensors


def _unsupported(path: Path, name: str, dtype: Any) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {shorten(name)} has dtype {shorten(dtype)}, supported are"
        f" {', '.join(_STORED)}"
    )


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> Tensor:
    """One entry of a header."""
    label = shorten(name)
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: the header's entry for {label} is malformed")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise _unsupported(path, name, dtype)
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= 8
        or any(type(n) is not int or not 1 <= n < 1 << 48 for n in shape)
    ):
        raise CheckpointError(f"{path}: tensor {label} has the malformed shape {shorten(shape)}")
    if (
        not isinstance(span, list)
        or len(span) != 2
        or any(type(n) is not int or n < 0 for n in span)
        or span[1] - span[0] != math.prod(shape) * _SIZES[dtype]
    ):
        raise CheckpointError(
            f"{path}: tensor {label} has the byte range {shorten(span)}, which does not hold"
            f" {dtype} values of shape {shape}"
        )
    return Tensor(name, dtype, tuple(shape), path, data_start + span[0])
