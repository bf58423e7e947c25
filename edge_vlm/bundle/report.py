"""How good a bundle was found to be when it was made: part of its manifest.

Like all of a bundle these are claims of whoever made it; ``edge-vlm verify BUNDLE --against
CHECKPOINT`` measures them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from edge_vlm.families.parts import Part, Printable

MIN_COSINE = 0.995  # of the connector's output, mean over tokens
MAX_DIVERGENCE = 0.2  # nats a position

_Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
_Measure = Annotated[float, Field(ge=0, le=1e300, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Number = Annotated[int, Field(ge=0, le=1 << 44)]
_Name = Annotated[Printable, Field(min_length=1, max_length=200)]
_Names = Annotated[tuple[_Name, ...], Field(max_length=20_000)]


class VisionReport(Part):
    """The vision file against the checkpoint in float32; "worst" is that of one token in 100."""

    n_tiles: _Number
    cosine_mean: _Cosine
    cosine_worst: _Cosine
    error_mean: _Measure  # length of the difference, relative to the exact vector's
    error_worst: _Measure
    min_cosine: _Cosine  # what the mean cosine has to reach,
    min_cosine_worst: _Cosine  # and what the worst
    n_bytes: _Number
    bits_per_weight: _Measure
    n_products: _Number  # matrix products, of which
    kept: _Names  # are in higher precision than the name of the precision says


class Calibration(Part):
    """What the importance matrix was collected from."""

    source: _Name
    n_prompts: _Number
    n_positions: _Number


class DecoderReport(Part):
    """The decoder file in llama.cpp against the checkpoint in float32.

    Compared wherever text follows in held-out prompts with pictures; divergences in nats, "worst"
    is that of one position in 100.
    """

    source: _Name
    n_prompts: _Number
    n_positions: _Number
    divergence_mean: _Measure
    divergence_worst: _Measure
    same_top: _Share  # positions with the same likeliest token
    perplexity: _Measure
    perplexity_ratio: _Measure  # over the checkpoint's
    max_divergence: _Measure  # what the mean divergence has to stay below


class DecoderFile(Part):
    """What is stored in the decoder file."""

    n_bytes: _Number
    bits_per_weight: _Measure
    types: dict[_Name, _Number] = Field(max_length=64)  # number of tensors of each type
    kept: _Names  # weights in a larger type than most
    calibration: Calibration | None


class Report(Part):
    """Everything measured; a part that was not measured is None."""

    vision: VisionReport | None
    decoder: DecoderReport | None
    decoder_file: DecoderFile

    @property
    def failures(self) -> list[str]:
        """A sentence for each limit that is not kept."""
        found = []
        vision, decoder = self.vision, self.decoder
        if vision and vision.cosine_mean < vision.min_cosine:
            found.append(
                f"the vision tower's mean cosine {vision.cosine_mean:.4f} is below"
                f" {vision.min_cosine:g}"
            )
        if vision and vision.cosine_worst < vision.min_cosine_worst:
            found.append(
                f"the vision tower's worst cosine {vision.cosine_worst:.4f} is below"
                f" {vision.min_cosine_worst:.4g}"
            )
        if decoder and decoder.divergence_mean > decoder.max_divergence:
            found.append(
                f"the decoder's mean divergence {decoder.divergence_mean:.3f} is above"
                f" {decoder.max_divergence:g}"
            )
        return found

    def text(self) -> str:
        """The table, one line a row."""
        lines = (*self._vision_lines(), *self._decoder_lines())
        return "\n".join(f"{label:<13} {value}" for label, value in lines)

    def _vision_lines(self) -> Iterator[tuple[str, str]]:
        if vision := self.vision:
            size, bits = _size(vision.n_bytes), vision.bits_per_weight
            limits = f"at least {vision.min_cosine:g} and {vision.min_cosine_worst:.4g}"
            cosine = f"{vision.cosine_mean:.5f} mean, {vision.cosine_worst:.5f} worst 1 %"
            yield "vision", f"{size}, {bits:.2f} bits a weight"
            yield "  cosine", f"{cosine} ({limits}; {vision.n_tiles} tiles)"
            yield "  error", f"{vision.error_mean:.2%} mean, {vision.error_worst:.2%} worst 1 %"
            yield "  kept", _kept(vision.kept, f"of {vision.n_products} matrix products")

    def _decoder_lines(self) -> Iterator[tuple[str, str]]:
        file = self.decoder_file
        yield "decoder", f"{_size(file.n_bytes)}, {file.bits_per_weight:.2f} bits a weight"
        yield "  tensors", ", ".join(f"{count} {name}" for name, count in file.types.items())
        if file.kept:
            yield "  kept", _kept(file.kept, "tensors in a larger type")
        if made := file.calibration:
            numbers = f"{made.n_prompts} prompts, {made.n_positions} positions"
            yield "  imatrix", f"{made.source}: {numbers}"
        if decoder := self.decoder:
            mean, worst = decoder.divergence_mean, decoder.divergence_worst
            numbers = f"{decoder.n_positions} positions, {decoder.n_prompts} prompts"
            limit = f"at most {decoder.max_divergence:g}; {numbers}"
            ratio = f"{decoder.perplexity_ratio:.4f} of the checkpoint's"
            yield "  divergence", f"{mean:.4f} mean, {worst:.3f} worst 1 % ({limit})"
            yield "  same token", f"{decoder.same_top:.1%}"
            yield "  perplexity", f"{decoder.perplexity:.4g}, {ratio}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def _kept(names: tuple[str, ...], of: str) -> str:
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} {of}{': ' if names else ''}{shown}"
