"""A random checkpoint in the released layout, at full size, written one block at a time.

It lets a device be measured, and an export be rehearsed, before five gigabytes are downloaded. The
sizes, names, shapes and ids are the released model's; the values are normal random numbers whose
spread keeps every activation finite: 1 / sqrt(inputs) for a matmul, and less where a block adds to
the residual stream. What such a model answers means nothing.

Qwen's vocabulary is not part of this package, so the tokenizer is made up too, unless the folder
that the settings come from has one: see ``tokenizer.py``.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from edge_vlm.errors import CheckpointError, InputError
from edge_vlm_export.checkpoint.config_file import read_object
from edge_vlm_export.checkpoint.new_folder import check_space, check_target, new_folder
from edge_vlm_export.checkpoint.tensors import INDEX_NAME, Float32, Shape
from edge_vlm_export.checkpoint.tokenizer import NAMES, TOKENIZER_NAME
from edge_vlm_export.counted import Counted, Progress
from edge_vlm_export.families.opened import Description
from edge_vlm_export.families.registry import families, family_of
from edge_vlm_export.synthetic.tokenizer import tokenizer_files

TOKENIZER_FILES = (TOKENIZER_NAME, *NAMES)
SHARD_BYTES = 2 * 10**9
BLOCK_VALUES = 1 << 22  # random values drawn at a time: 16 MiB of float32
BYTES_PER_VALUE = 2  # bfloat16

HEAD_GAIN = 3.0  # logits of a trained model spread about this wide
TIED_GAIN = 0.25
NORM_SPREAD = 0.1  # of norm weights around 1
SMALL = 0.02  # biases and position embeddings


def synthesize(
    config: str | Path,
    out: Path,
    *,
    layers: int | None = None,
    vision_layers: int | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write a random bfloat16 checkpoint to the new folder ``out``.

    Args:
        config: "jina-vlm", "demo", or a folder with a checkpoint's settings files.
        out: Folder to create; its parent has to exist.
        layers: Decoder layers, where fewer or more than the config's are wanted.
        vision_layers: Layers of the vision tower, likewise.
        seed: The same seed, name and shape give the same tensor.
        shard_bytes: What a file of weights holds at most, or one larger tensor.
        progress: Called with "weights", the bytes done and the bytes in total. An exception it
            raises stops the work and leaves nothing behind.

    Raises:
        CheckpointError: the settings files are missing, malformed or not supported.
        InputError: ``out`` exists or the disk lacks room.
        EdgeVLMError: writing failed.
    """
    out, source = Path(out), config_folder(config)
    check_target(out, overwrite=False)
    with new_folder(out, overwrite=False) as folder:
        _write_settings(source, folder, layers, vision_layers)
        model = Description(folder)
        _write_tokenizer(source, folder, model, seed)
        n_bytes = BYTES_PER_VALUE * sum(map(math.prod, model.shapes().values()))
        check_space(out.parent, n_bytes)
        _write_weights(folder, model, seed, shard_bytes, Counted("weights", n_bytes, progress))
    return out


def config_folder(config: str | Path) -> Path:
    """The folder with the settings files of a name in ``configs()``, or the folder given.

    Raises:
        InputError: there is no such folder.
    """
    named = configs()
    for folder in named.get(str(config), (Path(config),)):
        if folder.is_dir():
            return folder
    raise InputError(f"{config}: is neither {' nor '.join(named)} nor a folder")


def configs() -> dict[str, tuple[Path, ...]]:
    """Places of the settings files that come with the exporter, by name."""
    return {name: where for f in families().values() for name, where in f.configs.items()}


def _write_settings(
    source: Path, folder: Path, layers: int | None, vision_layers: int | None
) -> None:
    family = family_of(source)
    for name in ("config.json", *family.required_files, *family.optional_files):
        if name in TOKENIZER_FILES:
            continue
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
        elif name not in family.optional_files:
            raise CheckpointError(f"{source / name}: is missing")
    config = read_object(folder / "config.json")
    for key, count in (
        ("text_config", layers),
        ("llm_config", layers),
        ("vision_config", vision_layers),
    ):
        # Some have the language model's keys at the top.
        part = config.get(key, config if key == "text_config" else None)
        if isinstance(part, dict):
            part["dtype"] = "bfloat16"
            for name in ("n_layers", "num_hidden_layers", "depth"):
                if count is not None and name in part:
                    part[name] = count
    config["dtype"] = "bfloat16"
    _write_json(folder / "config.json", config)


def _write_tokenizer(source: Path, folder: Path, model: Description, seed: int) -> None:
    if (source / TOKENIZER_NAME).is_file():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
        return
    special = model.family.made_up_tokens(model.settings)
    if not special:
        raise CheckpointError(f"{source / TOKENIZER_NAME}: is missing")
    for name, content in tokenizer_files(special, seed).items():
        _write_json(folder / name, content, indent=None if name == TOKENIZER_NAME else 2)


def _write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _write_weights(
    folder: Path, model: Description, seed: int, shard_bytes: int, written: Callable[[int], None]
) -> None:
    """One file, or several of at most ``shard_bytes`` (or one larger tensor) and their index."""
    shapes = model.shapes()
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: BYTES_PER_VALUE * math.prod(shape),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        _write_shard(folder / file, {name: shapes[name] for name in names}, model, seed, written)
    if split.is_sharded:
        n_values = sum(map(math.prod, shapes.values()))
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        content = {"metadata": {"total_parameters": n_values, **split.metadata}}
        _write_json(folder / INDEX_NAME, content | {"weight_map": weight_map})


def _write_shard(
    path: Path,
    shapes: Mapping[str, Shape],
    model: Description,
    seed: int,
    written: Callable[[int], None],
) -> None:
    """The format is described in ``checkpoint.py``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + BYTES_PER_VALUE * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for block in random_values(name, shape, model, seed):
                stored = block.astype(ml_dtypes.bfloat16)
                file.write(stored.view(np.uint16).data)
                written(stored.nbytes)


def random_values(name: str, shape: Shape, model: Description, seed: int) -> Iterator[Float32]:
    """The values of a tensor of that name and shape in order, in flat blocks of float32."""
    mean, std = _spread(name, shape, model)
    # From the name, so that a tensor does not depend on what is written before it.
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    left = math.prod(shape)
    while left:
        block = np.zeros(min(left, BLOCK_VALUES), np.float32)
        if std:
            generator.standard_normal(out=block, dtype=np.float32)
            block *= np.float32(std)
        block += np.float32(mean)
        yield block
        left -= block.size


def _spread(name: str, shape: Shape, model: Description) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    told = model.family.spread(name, shape, model.settings)
    if told is not None:
        return told
    if name in model.decoder.table:
        # A tied table of ordinary spread would make every token its own likeliest successor.
        tied = any(model.settings.tie_word_embeddings)
        return 0.0, TIED_GAIN / math.sqrt(shape[1]) if tied else 1.0
    if len(shape) == 1:
        return (1.0, NORM_SPREAD) if name.endswith(".weight") else (0.0, SMALL)
    if name in model.tower.tensors:  # added to something, such as positions
        return 0.0, SMALL
    std = 1 / math.sqrt(math.prod(shape[1:]))
    if name == model.decoder.head:
        return 0.0, HEAD_GAIN * std
    return 0.0, std / math.sqrt(_n_added(model).get(name, 1))


@cache
def _n_added(model: Description) -> dict[str, int]:
    """Of matrices whose products add to a residual stream: how many do."""
    layer, n_layers = model.decoder.layer, model.text.n_layers
    parts = ("attn_output.weight", "ffn_down.weight")
    found = {layer(i)[part].tensor: 2 * n_layers for i in range(n_layers) for part in parts}
    linears = model.tower.linears.values()
    return found | {name: linear.n_added for linear in linears for name in linear.weights}
