"""How fast a machine runs a bundle: what predictions need; kept by ``tuning.py``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from edge_vlm.errors import InputError


@dataclass(frozen=True)
class Speeds:
    """Medians of short measurements, or a device profile's estimates.

    Raises:
        InputError: a value is not a positive, finite number.
    """

    load_seconds: float  # from the start of the process to a loaded model
    vision_seconds_per_tile: float  # tower and connector, one crop
    prefill_tokens_per_second: float  # of a prompt of ``prefill_tokens``
    prefill_tokens: int
    decode_tokens_per_second: float  # with ``decode_positions`` in the KV cache
    decode_positions: int
    # The same with a KV cache of q8_0, whose attention llama.cpp computes in another way, if that
    # was measured.
    quantized_prefill_tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None and name == "quantized_prefill_tokens_per_second":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise InputError(f"{name}: must be a positive number, not {value!r}")
