"""What is wanted of an export, checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from edge_vlm.bundle.report import MAX_DIVERGENCE, MIN_COSINE
from edge_vlm.errors import InputError
from edge_vlm_export.decoder.gguf_file import UNQUANTIZED
from edge_vlm_export.decoder.quantizer import MIXTURES, TENSOR_TYPES
from edge_vlm_export.graph.precision import PRECISIONS, QUANTIZED, TARGETS


@dataclass(frozen=True)
class VisionChoice:
    """What is wanted of the vision part.

    Args:
        precision: int8, int8-static, int4, fp16 or fp32.
        target: Layout of its graph: "cpu" with onnxruntime's fused operators, or "portable".
        batch: Crops in a run where it is to be fixed, for engines that want every shape to be one.
        min_cosine: What its output's mean cosine has to reach; see ``vision.error_budget``.
        calibrate: "builtin" or a folder of pictures: calibrate with more tiles.
        measure: Compare what was written with the checkpoint; by default what is quantized.

    Raises:
        InputError: an option is unknown.
    """

    precision: str
    target: str = "cpu"
    batch: int | None = None
    min_cosine: float = MIN_COSINE
    calibrate: str | Path | None = None
    measure: bool | None = None

    def __post_init__(self) -> None:
        _check("vision", self.precision, PRECISIONS)
        _check("target", self.target, TARGETS)
        if not 0 < self.min_cosine < 1:
            raise InputError("min-cosine: must be between 0 and 1")

    @property
    def measured(self) -> bool:
        """Whether the result is compared with the checkpoint."""
        return self.precision in QUANTIZED or bool(self.measure)


@dataclass(frozen=True)
class DecoderChoice:
    """What is wanted of the decoder.

    Args:
        kind: f32, f16, bf16, or a mixture of llama.cpp: q4_k_m, q4_0, q5_k_m, q6_k, q8_0, iq4_xs.
        head: Type of the output head, by default what the mixture says.
        embedding: Type of the token table, likewise.
        calibrate: "builtin", or a folder of pictures (see ``conversations.read_samples``): collect
            an importance matrix for the quantizer.
        measure: As above.
        max_divergence: The largest mean divergence, in nats, that the comparison may find.

    Raises:
        InputError: an option is unknown or fits no other.
    """

    kind: str
    head: str | None = None
    embedding: str | None = None
    calibrate: str | Path | None = None
    measure: bool | None = None
    max_divergence: float = MAX_DIVERGENCE

    def __post_init__(self) -> None:
        _check("decoder", self.kind, (*MIXTURES, *UNQUANTIZED))
        for option, value in (("head", self.head), ("embedding", self.embedding)):
            if value is not None:
                _check(f"decoder-{option}", value, TENSOR_TYPES)
                self._needs_mixture(f"decoder-{option}")
        if self.calibrate is not None:
            self._needs_mixture("calibrate")
        if not 0 < self.max_divergence < math.inf:
            raise InputError("max-divergence: must be a positive number")

    @property
    def quantized(self) -> bool:
        """Whether llama.cpp's quantizer is needed."""
        return self.kind in MIXTURES

    def _needs_mixture(self, option: str) -> None:
        if not self.quantized:
            raise InputError(
                f"{option}: {self.kind} stores every weight alike; choose one of"
                f" {', '.join(MIXTURES)}"
            )


def _check(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        InputError: it is not.
    """
    if value not in choices:
        raise InputError(f"{option}: {value!r} is none of {', '.join(choices)}")
