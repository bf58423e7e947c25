"""What is wanted of an export, checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from edge_vlm.errors import InputError
from edge_vlm_export.decoder.gguf_file import UNQUANTIZED
from edge_vlm_export.decoder.quantizer import MIXTURES, TENSOR_TYPES
from edge_vlm_export.graph.precision import PRECISIONS, QUANTIZED, TARGETS, Recipe


@dataclass(frozen=True)
class Choices:
    """What is wanted of both files.

    Args:
        vision: Precision of the tower: int8, int8-static, int4, fp16 or fp32.
        target: Layout of its graph: "cpu" with onnxruntime's fused operators, or "portable".
        static_shapes: One crop in a run, for engines that want every shape to be fixed.
        min_cosine: What its output's mean cosine has to reach; see ``vision.error_budget``.
        decoder: f32, f16, bf16, or one of ``quantizer.MIXTURES``.
        decoder_head: Type of the output head, by default what the mixture says.
        decoder_embedding: Type of the token table, likewise.
        calibrate: "builtin", or a folder of pictures (see ``conversations.read_samples``): more
            tiles for the tower, and an importance matrix for the decoder's quantizer.
        measure: Compare what was written with the checkpoint; by default what is quantized.
        max_divergence: The largest mean divergence of the decoder, in nats.

    Raises:
        InputError: an option is unknown or fits no other.
    """

    vision: str
    target: str
    static_shapes: bool
    min_cosine: float
    decoder: str
    decoder_head: str | None
    decoder_embedding: str | None
    calibrate: str | Path | None
    measure: bool | None
    max_divergence: float

    def __post_init__(self) -> None:
        _check("vision", self.vision, PRECISIONS)
        _check("target", self.target, TARGETS)
        if not 0 < self.min_cosine < 1:
            raise InputError("min-cosine: must be between 0 and 1")
        _check("decoder", self.decoder, (*MIXTURES, *UNQUANTIZED))
        heads = {"decoder-head": self.decoder_head, "decoder-embedding": self.decoder_embedding}
        for option, value in heads.items():
            if value is not None:
                _check(option, value, TENSOR_TYPES)
        for option, given in {**heads, "calibrate": self.calibrate}.items():
            if given is not None and not self.quantizes:
                raise InputError(
                    f"{option}: {self.decoder} stores every weight alike; choose one of"
                    f" {', '.join(MIXTURES)}"
                )
        if not 0 < self.max_divergence < math.inf:
            raise InputError("max-divergence: must be a positive number")

    @property
    def recipe(self) -> Recipe:
        """Of the tower, before anything is known about the model."""
        return Recipe(self.vision, self.target, 1 if self.static_shapes else None)

    @property
    def measures_vision(self) -> bool:
        """Whether the tower is compared with the checkpoint."""
        return self.vision in QUANTIZED or bool(self.measure)

    @property
    def measures_decoder(self) -> bool:
        """Whether the decoder is."""
        return self.quantizes if self.measure is None else self.measure

    @property
    def quantizes(self) -> bool:
        """Whether llama.cpp's quantizer is needed."""
        return self.decoder in MIXTURES


def _check(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{option}: {value!r} is none of {', '.join(choices)}")
