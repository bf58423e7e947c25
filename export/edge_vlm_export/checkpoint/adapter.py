"""LoRA adapters, merged into the tensors of their base as these are read.

A folder that PEFT wrote has ``adapter_config.json`` and ``adapter_model.safetensors``, where a
linear layer of weight W (out, in) has ``lora_A`` (r, in) and ``lora_B`` (out, r), and the merged
layer W + scale * B A. The sum is float32, and no more than a block of it is in memory at a time.
Every other kind of adapter is refused by name.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685); the scale
alpha / sqrt(r) is that of "rsLoRA" (arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edge_vlm.bundle.checksums import sha256_of
from edge_vlm.bundle.json_text import shorten, wrong
from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.config_file import ADAPTER, HubName, Off, Part, read_part
from edge_vlm_export.checkpoint.known_keys import check_known
from edge_vlm_export.checkpoint.tensors import (
    INDEX_NAME,
    Checkpoint,
    Float32,
    Shape,
    Tensor,
    read_tensors,
)
from edge_vlm_export.checkpoint.tensors import WEIGHTS_NAME as MODEL_WEIGHTS

WEIGHTS_NAME = "adapter_model.safetensors"
_OTHER_WEIGHTS = "adapter_model.bin"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
_CANNOT = "which cannot be merged"
_CANNOT_HERE = f"{_CANNOT} here: merge it with peft's merge_and_unload() and export the result"
_UNSUPPORTED = (
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding_", "an adapter of embeddings"),
    (".lora_B.bias", "an adapter with biases"),
    ("prompt_embeddings", "a learned prompt"),
)

Rename = Callable[[str], "str | None"]


class AdapterConfig(Part):
    """``adapter_config.json``. What else PEFT writes there is off as long as it is empty."""

    # About training, names of parts that the tensors tell as well, and settings of what is off.
    harmless: ClassVar = (
        *(
            "task_type",
            "inference_mode",
            "peft_version",
            "lora_dropout",
            "revision",
            "megatron_core",
        ),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("runtime_config", "qalora_group_size", "ensure_weight_tying"),
        *("eva_config", "corda_config", "auto_mapping"),
    )

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=1 << 16)]
    lora_alpha: Annotated[float, Field(gt=-1e6, lt=1e6)]
    use_rslora: bool = False
    use_dora: Off = False
    fan_in_fan_out: Off = False
    lora_bias: Off = False
    bias: Literal["none"] = "none"
    # Others change the base, so that the adapter fits no published one.
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True
    modules_to_save: list[str] = Field(default=[], max_length=1000)
    rank_pattern: dict[str, Any] = Field(default={})
    base: HubName = Field(default=None, validation_alias="base_model_name_or_path")

    @classmethod
    def prepared(cls, data: dict[str, Any]) -> dict[str, Any]:
        """What PEFT adds to LoRA is off by an empty value."""
        told = {key: value for key, value in data.items() if value or key in cls.model_fields}
        if "peft_type" in told and told["peft_type"] != "LORA":
            raise wrong("peft_type", told["peft_type"], f'{_CANNOT}: only "LORA" can')
        check_known(cls, told, cls.harmless, _CANNOT_HERE)
        return super().prepared(told)

    def scale(self, rank: int) -> float:
        """What the product of an adapter of this rank is multiplied with."""
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Merged(Tensor):
    """A weight (out, in) with the product of ``b`` (out, r) and ``a`` (r, in) added to it."""

    base: Tensor
    a: Tensor
    b: Tensor
    scale: float

    def rows(self, start: int, stop: int) -> Float32:
        values = self.base.rows(start, stop)
        values += (self.b.rows(start, stop) * self.scale) @ self.a.read()
        return values


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings and tensors, none of which was read so far."""

    folder: Path
    config: AdapterConfig
    tensors: Mapping[str, Tensor]

    @cached_property
    def label(self) -> str:
        """What a manifest calls it: the folder's name, and the beginning of the SHA-256."""
        digest = sha256_of(self.folder / WEIGHTS_NAME)
        return f"{self.folder.resolve().name[:100]} (sha256 {digest[:16]})"

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read an adapter's settings and the headers of its tensors.

        Raises:
            CheckpointError: a file is missing or malformed, or the adapter is of another kind.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such adapter folder")
        config, path = read_part(AdapterConfig, folder / ADAPTER), folder / WEIGHTS_NAME
        if not path.exists() and (folder / _OTHER_WEIGHTS).exists():
            raise CheckpointError(
                f"{folder / _OTHER_WEIGHTS}: a program runs when it is read; load it with peft and"
                f" save it with save_pretrained(...), as {WEIGHTS_NAME}"
            )
        return cls(folder, config, read_tensors(path))

    def merge(self, base: Checkpoint, rename: Rename, fixed: Collection[str]) -> Checkpoint:
        """The tensors of a base with those of the adapter in them.

        Args:
            base: The tensors by the names that ``rename`` gives.
            rename: See ``Checkpoint.open``.
            fixed: Tensors that are tables, which no linear layer has.

        Raises:
            CheckpointError: an adapter's tensor is of another kind, or belongs to no tensor of the
                base or to one of another shape.
        """
        tensors, pairs = dict(base.tensors), dict[str, dict[str, Tensor]]()
        for tensor in self.tensors.values():
            where = f"{tensor.path}: tensor {shorten(tensor.name)}"
            for part, kind in _UNSUPPORTED:
                if part in tensor.name:
                    raise CheckpointError(f"{where} is of {kind}, {_CANNOT_HERE}")
            match = _LORA.fullmatch(tensor.name)
            stored = f"{match[1]}.weight" if match else tensor.name
            stored = stored.replace(".modules_to_save.default.", ".").removeprefix(_PREFIX)
            name = rename(stored)
            if name is None or name not in base:
                raise CheckpointError(f"{where} belongs to no tensor of {base.where}")
            if match:
                pairs.setdefault(name, {})[match[2]] = tensor
            else:
                self._check_saved(tensor, base[name].shape)
                tensors[name] = tensor
        if not pairs:
            raise CheckpointError(f"{self.folder / WEIGHTS_NAME}: has no lora_A and lora_B")
        for name, pair in pairs.items():
            if name in fixed:
                problem = f"is of {name}, which is a table and no linear layer"
                raise CheckpointError(f"{self._of(pair)} {problem}")
            tensors[name] = self._merged(tensors[name], pair)
        return Checkpoint(tensors, base.where)

    def _of(self, pair: Mapping[str, Tensor]) -> str:
        tensor = next(iter(pair.values()))
        return f"{tensor.path}: tensor {shorten(tensor.name)}"

    def _check_saved(self, tensor: Tensor, shape: Shape) -> None:
        """A tensor that replaces one of the base has to be meant, and of its shape."""
        where = f"{tensor.path}: tensor {shorten(tensor.name)}"
        if not any(f".{told}." in f".{tensor.name}" for told in self.config.modules_to_save):
            raise CheckpointError(
                f"{where} is neither lora_A nor lora_B, and modules_to_save does not name it"
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"{where} has shape {list(tensor.shape)}, the base's has {list(shape)}"
            )

    def _merged(self, base: Tensor, pair: Mapping[str, Tensor]) -> Merged:
        where = self._of(pair)
        if len(pair) < 2:
            raise CheckpointError(f"{where} has no other half: lora_A and lora_B go together")
        a, b = pair["A"], pair["B"]
        rank = a.shape[0]
        if len(base.shape) != 2 or (b.shape, a.shape[1:]) != (
            (base.shape[0], rank),
            base.shape[1:],
        ):
            raise CheckpointError(
                f"{where}: shapes {list(b.shape)} and {list(a.shape)} of lora_B and lora_A do not"
                f" fit {shorten(base.name)} of shape {list(base.shape)}: it is of another base"
            )
        if rank != self.config.r and not self.config.rank_pattern:
            raise CheckpointError(f"{where} has rank {rank}, {ADAPTER} says {self.config.r}")
        stored = base.name, "F32", base.shape, base.path, base.offset
        return Merged(*stored, base=base, a=a, b=b, scale=self.config.scale(rank))


def beside(names: Collection[str]) -> str | None:
    """What is to be said of an adapter among the files of a model, which was not asked for."""
    found = next((name for name in (ADAPTER, WEIGHTS_NAME, _OTHER_WEIGHTS) if name in names), None)
    if found is None or not {MODEL_WEIGHTS, INDEX_NAME} & set(names):
        return None
    return (
        f"{found}: a LoRA adapter lies beside the model; --adapter FOLDER merges it, or move it"
        " away to export the model without it"
    )
