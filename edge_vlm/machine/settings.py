"""What this machine gives: threads, memory, limits. None of it changes an answer's meaning."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edge_vlm.errors import InputError
from edge_vlm.machine.engine_settings import (
    KV_TYPES,
    WHOLE_NUMBERS,
    EngineSettings,
    check_engine_setting,
    untuned,
)
from edge_vlm.machine.folders import pictures_cache
from edge_vlm.machine.providers import PROVIDER_CHOICES, parse_gpu_layers

CACHE_SIZE = 4_000_000_000  # bytes
MAX_PIXELS = 100_000_000  # of a picture
KV_BUDGET = 530_000_000  # bytes: what the model's paper states for twelve tiles and the thumbnail
# Whether the vision tower and the decoder are in memory at the same time.
RESIDENCIES = ("auto", "together", "in-turns")
ALPHA = ("white", "drop")
_LIMITS = {
    "kv_budget": (1, 1 << 44),
    "max_pixels": (1, 1 << 31),
    "dpi": (10, 1200),
    "cache_size": (0, 1 << 50),
    "tile_memory": (0, 1 << 40),
    "ram": (1, 1 << 50),
    "max_tiles": (1, 1024),
}


@dataclass(frozen=True)
class MachineSettings:
    """Settings of the machine; ``from_environment`` reads them from ``EDGE_VLM_*``.

    Those that are fields of ``EngineSettings`` too are None where ``edge-vlm tune``, or else a
    default, shall decide. ``threads`` alone stands for all three numbers of threads.

    Raises:
        InputError: a value is out of its range.
    """

    threads: int | None = None
    prefill_threads: int | None = None
    vision_threads: int | None = None
    vision_streams: int | None = None
    batch_size: int | None = None
    flash_attention: str | None = None
    repack: bool | None = None
    mmap: bool | None = None
    spinning: bool | None = None
    tiles_per_call: int | None = None
    residency: str = "auto"  # see RESIDENCIES
    ram: int | None = None  # bytes that the process may take; see ``edge_vlm.planning.limits``
    max_tiles: int | None = None  # of every picture, besides the thumbnail
    kv_budget: int = KV_BUDGET  # bytes
    kv_type: str = "f16"  # element type of the KV cache
    max_pixels: int = MAX_PIXELS  # of a picture
    image_formats: tuple[str, ...] = ()  # accepted besides the usual ones
    alpha: str = "white"  # behind hidden pixels; or drop: the colours they are stored with
    dpi: int = 150  # at which pages of a PDF are drawn
    provider: str = "auto"  # onnxruntime execution provider of the vision tower
    gpu_layers: str | int = "auto"  # decoder layers on a GPU: a count, auto or all
    cache: str | os.PathLike[str] | None = field(default_factory=pictures_cache)  # None: no disk
    cache_size: int = CACHE_SIZE  # bytes on disk
    tile_memory: int = 128 << 20  # bytes of tiles' embeddings to hold in memory
    trust_bundle: bool = False  # load a bundle without trying it in a process of its own
    engine_logs: bool = False  # let llama.cpp and onnxruntime write to stderr

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if value is None and name in ("ram", "max_tiles"):
                continue
            if not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name}: must be from {low} to {high}, not {value!r}")
        if not isinstance(self.cache, str | os.PathLike | None):
            raise InputError(f"cache: must be a folder, or None for no cache, not {self.cache!r}")
        for name, known in (
            ("kv_type", tuple(KV_TYPES)),
            ("residency", RESIDENCIES),
            ("alpha", ALPHA),
            ("provider", PROVIDER_CHOICES),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name}: must be one of {', '.join(known)}, not {getattr(self, name)}"
                )
        try:
            parse_gpu_layers(str(self.gpu_layers))
        except ValueError as error:
            raise InputError(f"gpu_layers: {error}") from error
        for name, value in self._given().items():
            check_engine_setting(name, value)

    def engine_settings(
        self, tuned: EngineSettings | None = None, *, precision: str = ""
    ) -> EngineSettings:
        """What the engines get: what is given here, else ``tuned``, else defaults.

        Defaults depend on the ``precision`` of the bundle's decoder.
        """
        base = tuned or untuned(precision)
        if self.repack is not None and self.repack != base.repack:
            base = base.with_repack(self.repack)
        return replace(base, **self._given())

    def fixed_engine_settings(self) -> set[str]:
        """Names of those that neither tuning nor defaults decide."""
        return set(self._given())

    def _given(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(EngineSettings)}
        given = {name: value for name, value in values.items() if value is not None}
        if self.threads is not None:
            given = {"prefill_threads": self.threads, "vision_threads": self.threads} | given
        return given

    def without_cache(self) -> MachineSettings:
        """The same, but nothing is kept between questions, neither on disk nor in memory."""
        return replace(self, cache=None, tile_memory=0)

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ, **overrides: object
    ) -> MachineSettings:
        """Overrides that are not None, else the environment, else defaults.

        Each field but ``image_formats`` and ``tile_memory`` has a variable: ``EDGE_VLM_THREADS``
        and so on. ``EDGE_VLM_CACHE`` may be empty or ``off``.

        Raises:
            InputError: a variable does not hold what it should.
        """
        values: dict[str, object] = {"cache": pictures_cache(environment)}
        for name, read in _READERS.items():
            variable = f"EDGE_VLM_{name.upper()}"
            if text := environment.get(variable):
                try:
                    values[name] = read(text)
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
    number = r"\d{1,20}(?:\.\d{1,20})?"
    match = re.fullmatch(rf"\s*({number})\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{text[:40]!r} is not a size such as 530MB or 0.5GiB")
    power = " kmgt".index(match[2].lower() or " ")
    unit: int = (1024 if match[3] else 1000) ** power
    return round(float(match[1]) * unit)


def _switch(text: str) -> bool:
    return text.strip().lower() not in ("0", "false", "no", "off")


def _whole_number(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 20:
        raise ValueError(f"{text[:40]!r} is not a whole number in range")
    return int(text)


# How the variable of each setting is read.
_READERS: dict[str, Callable[[str], object]] = {
    **dict.fromkeys((*WHOLE_NUMBERS, "max_tiles", "dpi"), _whole_number),
    **dict.fromkeys(("repack", "mmap", "spinning", "trust_bundle", "engine_logs"), _switch),
    **dict.fromkeys(("flash_attention", "residency", "kv_type", "provider", "alpha"), str.lower),
    **dict.fromkeys(("kv_budget", "ram", "max_pixels", "cache_size"), parse_size),
    "gpu_layers": parse_gpu_layers,
}
