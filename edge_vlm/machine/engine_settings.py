"""How the engines work on this machine: what ``edge-vlm tune`` measures and stores."""

from __future__ import annotations

import platform
from dataclasses import dataclass, fields, replace
from typing import Any

from edge_vlm.errors import InputError
from edge_vlm.machine.hardware import default_threads, usable_cores
from edge_vlm.machine.memory import can_forget

# Rows from which on it pays to lay the KV cache out for flash attention and back.
FLASH_ROWS = 512
# Fewer at once are added up in half precision by llama.cpp's flash attention.
FLASH_TILE = 64
# Largest batch where attention scores are held: they take memory and gain nothing beyond.
SCORES_BATCH = 256
# Element types of the KV cache, and bytes per element; in the quantized ones, blocks of 32
# elements share a 2-byte scale.
KV_TYPES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
FLASH_ATTENTION = ("off", "prefill", "on", "auto")  # auto: llama.cpp decides
WHOLE_NUMBERS = {  # and their ranges
    "threads": (1, 1024),
    "prefill_threads": (1, 1024),
    "vision_threads": (1, 1024),
    "vision_streams": (1, 64),
    "batch_size": (1, 1 << 16),
    "tiles_per_call": (1, 64),
}


def flash_mode(flash_attention: str, kv_type: str, batch_size: int) -> str:
    """What becomes of the setting with this KV cache and these batches."""
    if kv_type.startswith("q"):
        return "on"  # a quantized V cache exists for flash attention alone
    if flash_attention == "prefill" and batch_size < 2 * FLASH_TILE:
        return "off"  # the last two batches of a prompt could not both have FLASH_TILE rows
    return flash_attention


def check_engine_setting(name: str, value: Any) -> None:
    """Check one field of ``EngineSettings``.

    Raises:
        InputError: it is out of its range.
    """
    if name in WHOLE_NUMBERS:
        low, high = WHOLE_NUMBERS[name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise InputError(f"{name}: must be from {low} to {high}, not {value!r}")
    elif name == "flash_attention":
        if value not in FLASH_ATTENTION:
            raise InputError(f"{name}: must be one of {', '.join(FLASH_ATTENTION)}, not {value!r}")
    elif not isinstance(value, bool):
        raise InputError(f"{name}: must be true or false, not {value!r}")


@dataclass(frozen=True)
class EngineSettings:
    """Settings of llama.cpp and onnxruntime. They change an answer by floating-point ties alone.

    Raises:
        InputError: a value is out of its range.
    """

    threads: int  # of the decoder, for one token after the other
    prefill_threads: int
    vision_threads: int  # of all streams together
    vision_streams: int  # calls of the vision tower side by side, each with other tiles
    batch_size: int  # positions computed at once during prefill
    # off, on, auto, or prefill: on while a long prompt is computed, and the KV cache is then laid
    # out anew for the answer. A quantized KV cache always has it on.
    flash_attention: str
    repack: bool  # let llama.cpp interleave the weights' rows, for other kernels
    mmap: bool  # map the decoder's file instead of reading it
    spinning: bool  # threads that wait for each other always keep their core busy for a while
    tiles_per_call: int  # crops encoded at once

    def __post_init__(self) -> None:
        for field in fields(self):
            check_engine_setting(field.name, getattr(self, field.name))

    @property
    def streams(self) -> int:
        """Calls of the vision tower side by side: no more than threads."""
        return min(self.vision_streams, self.vision_threads)

    def with_repack(self, repack: bool) -> EngineSettings:
        """Interleaved weights or not; the file is mapped where that is no second copy of them."""
        return replace(self, repack=repack, mmap=can_forget() or not repack)


def untuned(precision: str = "", arm: bool | None = None) -> EngineSettings:
    """What is best on most machines of this kind, or on Linux on ARM or x86.

    On ARM the interleaved kernels make prefill 1.9 to 3.5 times as fast (llama.cpp PRs 17494,
    18096, 19356, 19360). On x86 they were slower here than the plain ones, which unpack a weight
    once for up to 256 positions; but q4_0 has no such plain ones.
    A thread that always spins takes the core, on a busy machine, away from the thread it waits
    for; without it ``waiting`` decides for llama.cpp. Two tiles side by side are faster than one
    after the other with all threads, which wait for each other after every operator. Flash
    attention makes prefill faster on x86 and decode slower; on ARM nobody measured it here.

    ``precision`` is that of the decoder's weights, as in its manifest; with ``arm``, it is for
    another machine that has such a processor or has not.
    """
    threads = default_threads()
    is_mapped = can_forget() or arm is not None
    if arm is None:
        arm = platform.machine().lower() in ("aarch64", "arm64")
    repack = arm or precision == "q4_0"
    return EngineSettings(
        threads=threads,
        prefill_threads=threads,
        vision_threads=threads,
        vision_streams=min(2, threads),
        batch_size=256 if arm else 512,
        flash_attention="off" if arm else "prefill",
        repack=repack,
        mmap=is_mapped or not repack,
        spinning=False,
        tiles_per_call=1,
    )


def engine_defaults() -> EngineSettings:
    """What llama.cpp and onnxruntime do when they are told nothing, with all cores."""
    threads = usable_cores()
    return EngineSettings(
        threads=threads,
        prefill_threads=threads,
        vision_threads=threads,
        vision_streams=1,
        batch_size=512,
        flash_attention="auto",
        repack=True,
        mmap=True,
        spinning=True,
        tiles_per_call=1,
    )
