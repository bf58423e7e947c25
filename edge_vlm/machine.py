"""What this machine gives: threads, memory, limits. None of it changes an answer's meaning."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_vlm.errors import InputError
from edge_vlm.folders import pictures_cache
from edge_vlm.hardware import default_threads
from edge_vlm.image import MAX_PIXELS
from edge_vlm.providers import PROVIDER_CHOICES, parse_gpu_layers

CACHE_SIZE = 4_000_000_000  # bytes
KV_BUDGET = 530_000_000  # bytes: what the model's paper states for twelve tiles and the thumbnail
# Bytes per element; blocks of 32 elements share a 2-byte scale in the quantized types.
KV_TYPES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


@dataclass(frozen=True)
class MachineSettings:
    """Settings of the machine; ``from_environment`` reads them from ``EDGE_VLM_*``.

    Raises:
        InputError: a value is out of its range.
    """

    threads: int = field(default_factory=default_threads)
    kv_budget: int = KV_BUDGET  # bytes
    kv_type: str = "f16"  # element type of the KV cache
    batch_size: int = 512  # positions computed at once during prefill
    max_pixels: int = MAX_PIXELS  # of a picture
    image_formats: tuple[str, ...] = ()  # accepted besides the usual ones
    provider: str = "auto"  # onnxruntime execution provider of the vision tower
    gpu_layers: str | int = "auto"  # decoder layers on a GPU: a count, auto or all
    cache: str | os.PathLike[str] | None = field(default_factory=pictures_cache)  # None: no disk
    cache_size: int = CACHE_SIZE  # bytes on disk
    tile_memory: int = 128 << 20  # bytes of tiles' embeddings to hold in memory
    engine_logs: bool = False  # let llama.cpp and onnxruntime write to stderr

    def __post_init__(self) -> None:
        limits = {
            "threads": (1, 1024),
            "kv_budget": (1, 1 << 44),
            "batch_size": (1, 1 << 16),
            "max_pixels": (1, 1 << 31),
            "cache_size": (0, 1 << 50),
            "tile_memory": (0, 1 << 40),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name}: must be from {low} to {high}, not {value!r}")
        if self.kv_type not in KV_TYPES:
            raise InputError(f"kv_type: must be one of {', '.join(KV_TYPES)}, not {self.kv_type}")
        if self.provider not in PROVIDER_CHOICES:
            known = ", ".join(PROVIDER_CHOICES)
            raise InputError(f"provider: must be one of {known}, not {self.provider}")
        try:
            parse_gpu_layers(str(self.gpu_layers))
        except ValueError as error:
            raise InputError(f"gpu_layers: {error}") from error

    def without_cache(self) -> MachineSettings:
        """The same, but nothing is kept between questions, neither on disk nor in memory."""
        return replace(self, cache=None, tile_memory=0)

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, **overrides: object
    ) -> MachineSettings:
        """Overrides that are not None, else ``EDGE_VLM_THREADS``, ``EDGE_VLM_KV_BUDGET``,
        ``EDGE_VLM_MAX_PIXELS``, ``EDGE_VLM_PROVIDER``, ``EDGE_VLM_GPU_LAYERS``,
        ``EDGE_VLM_CACHE`` (empty or ``off``: none), ``EDGE_VLM_CACHE_SIZE`` and
        ``EDGE_VLM_ENGINE_LOGS``, else defaults.

        Raises:
            InputError: a variable does not hold what it should.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, object] = {"cache": pictures_cache(environment)}
        readers: dict[str, Callable[[str], object]] = {
            "threads": _whole_number,
            "kv_budget": parse_size,
            "max_pixels": parse_size,
            "provider": str.lower,
            "gpu_layers": parse_gpu_layers,
            "cache_size": parse_size,
            "engine_logs": lambda text: text.lower() not in ("0", "false", "no", "off"),
        }
        for name, read in readers.items():
            variable = f"EDGE_VLM_{name.upper()}"
            if environment.get(variable):
                try:
                    values[name] = read(environment[variable])
                except ValueError as error:
                    raise InputError(f"{variable}: {error}") from error
        values |= {name: value for name, value in overrides.items() if value is not None}
        return cls(**values)  # type: ignore[arg-type]  # checked in __post_init__


def cpu_identity() -> list[str]:
    """What decides which kernels the engines choose, and so the last bits of their results."""
    found = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        for name in ("model name", "flags", "Features"):
            found += [line for line in lines if line.startswith(name)][:1]
    return found


def parse_size(text: str) -> int:
    """Bytes in a size such as ``530MB``, ``0.5GiB`` or ``1000000``.

    Raises:
        ValueError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a size such as 530MB or 0.5GiB")
    power = " kmgt".index(match[2].lower() or " ")
    unit: int = (1024 if match[3] else 1000) ** power
    return round(float(match[1]) * unit)


def _whole_number(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)
