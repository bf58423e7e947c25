"""What quantization has to know about activations: one pass in full precision over some tiles.

Outliers are moved out of what products read before it is rounded.

A few channels of a vision transformer carry values many times larger than the rest. With one scale
for the whole activation the rest is rounded to nothing. "SmoothQuant" (Xiao et al., arXiv
2211.10438) divides each input channel by a factor and multiplies the weight's column with it: the
product stays the same, and where the maker of the input is a norm or a linear layer, the division
disappears into its weights. Here the makers are the two norms of a block, the value rows of an
attention (for its output product) and the linear parts of a connector; only what a nonlinear
function makes (the product behind a GELU reads it) has to stay as it is. See ``architecture.Move``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm_export.graph import integers
from edge_vlm_export.graph.precision import Range, Recipe

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Float32
    from edge_vlm_export.samples.crops import CalibrationTiles
    from edge_vlm_export.vision.stagewise import StagedTower

EIGHT_BITS = ("int8", "int8-static")  # int4 leaves activations as they are
STRENGTHS = (0.35, 0.5, 0.65, 0.8)  # SmoothQuant's alpha; the best one is found by trying
SAMPLE_ROWS = 128
MAX_FACTOR = 1e4
_SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


class Inputs:
    """Statistics of what one product reads, gathered tile by tile."""

    def __init__(self, n_tiles: int) -> None:
        self._rows_per_tile = max(1, SAMPLE_ROWS // n_tiles)
        self._samples: list[Float32] = []
        self._n_rows = 0

    def add(self, x: Float32) -> None:
        """The input of one run, (..., in)."""
        x = x.reshape(-1, x.shape[-1])
        low, high = x.min(axis=0), x.max(axis=0)
        squares = np.einsum("ij,ij->j", x, x)
        if not self._samples:
            self.low, self.high, self._squares = low, high, squares
        else:
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
            self._squares = self._squares + squares
        self._n_rows += len(x)
        # Spread over the tile, and never only its first column of patches.
        chosen = np.linspace(0, len(x) - 1, min(self._rows_per_tile, len(x))).astype(int)
        self._samples.append(x[chosen].copy())

    @property
    def sample(self) -> Float32:
        """Some of the rows, (n, in)."""
        return np.concatenate(self._samples)[:SAMPLE_ROWS]

    @property
    def largest(self) -> Float32:
        """Largest magnitude of each channel, (in,)."""
        return np.asarray(np.maximum(np.abs(self.low), np.abs(self.high)))

    @property
    def mean_square(self) -> Float32:
        """Mean square of each channel, (in,)."""
        return np.asarray(self._squares / self._n_rows, np.float32)


def calibrate(
    tower: StagedTower,
    recipe: Recipe,
    tiles: CalibrationTiles,
    smooth: bool,
    step: Callable[[], None] = lambda: None,
) -> tuple[Float32, Recipe]:
    """One pass in full precision: its output, and the recipe with what it taught.

    Each stage's inputs are looked at and forgotten again, so memory does not grow with the depth.
    """
    rows: dict[str, Float32] = {}
    columns: dict[str, Float32] = {}
    ranges: dict[str, Range] = {}
    importance: dict[str, Float32] = {}
    state = tower.start(tiles)
    for stage in tower.stages:
        inputs = {name: Inputs(len(tiles)) for name in stage.products}
        runner = tower.runner(stage, Recipe(target="cpu"))
        state = tower.advance(runner, state, inputs)
        del runner
        for move in stage.moves if smooth and recipe.precision in EIGHT_BITS else ():
            readers = [
                (inputs[name], tower.linears[name].weight(tower.tensors)) for name in move.readers
            ]
            factors = choose_factors(readers)
            if factors is not None:
                rows[move.maker] = np.ones(move.n_rows or len(factors), np.float32)
                rows[move.maker][slice(*move.rows)] = factors
                columns.update(dict.fromkeys(move.readers, factors))
        for name in stage.products:
            if recipe.precision == "int8-static":
                signed = recipe.target == "portable"
                ranges[name] = clipped_range(inputs[name], columns.get(name), signed)
            elif recipe.precision == "int4":
                importance[name] = inputs[name].mean_square
        step()
    return state.x, Recipe(
        recipe.precision,
        recipe.target,
        rows=rows,
        columns=columns,
        ranges=ranges,
        importance=importance,
    )


def choose_factors(readers: Sequence[tuple[Inputs, Float32]]) -> Float32 | None:
    """Factors of each channel (in,) that make the readers' eight-bit products most exact.

    ``readers`` are what each reader reads, and its weight (out, in). None when nothing that was
    tried helps.
    """
    from_inputs = np.max([inputs.largest for inputs, _ in readers], axis=0)
    from_weights = np.max([np.abs(weight).max(axis=0) for _, weight in readers], axis=0)
    best: Float32 | None = None
    least = _error(readers, None)
    for strength in STRENGTHS:
        factors = _factors(from_inputs, from_weights, strength)
        error = _error(readers, factors)
        if error < least * 0.98:  # for less it is not worth another set of numbers
            best, least = factors, error
    return best


def _factors(inputs: Float32, weights: Float32, strength: float) -> Float32:
    factors = np.ones(len(inputs), np.float32)
    live = (inputs > 0) & (weights > 0)
    factors[live] = inputs[live] ** strength / weights[live] ** (1 - strength)
    factors[live] /= np.exp(np.log(factors[live]).mean()) if live.any() else 1
    return np.clip(factors, 1 / MAX_FACTOR, MAX_FACTOR)


def _error(readers: Sequence[tuple[Inputs, Float32]], factors: Float32 | None) -> float:
    """Squared error of the products, relative to their size."""
    total = 0.0
    for inputs, weight in readers:
        exact = inputs.sample @ weight.T
        x = inputs.sample if factors is None else inputs.sample / factors
        moved = weight if factors is None else weight * factors
        x = round_to(x, input_range(inputs, factors))
        difference = x @ rounded(moved).T - exact
        total += float(np.square(difference).sum() / max(np.square(exact).sum(), 1e-30))
    return total


def input_range(inputs: Inputs, factors: Float32 | None) -> Range:
    """The range of a product's input, divided by the factors of its channels."""
    low, high = inputs.low, inputs.high
    if factors is not None:
        low, high = low / factors, high / factors
    return Range(min(0.0, float(low.min())), max(0.0, float(high.max())))


def clipped_range(inputs: Inputs, factors: Float32 | None, signed: bool) -> Range:
    """The part of the range that gives the least squared error when rounded to eight bits.

    Cutting off a few large values can leave finer steps for all others.
    """
    whole = input_range(inputs, factors)
    x = inputs.sample if factors is None else inputs.sample / factors

    def error(limits: Range) -> float:
        return float(np.square(round_to(x, limits, signed) - x).sum())

    low, high = whole.low, whole.high
    if signed:
        return min((Range(low * shrink, high * shrink) for shrink in _SHRINKS), key=error)
    # One end after the other: values are rarely spread evenly around zero.
    best = min((Range(low, high * shrink) for shrink in _SHRINKS), key=error)
    return min((Range(low * shrink, best.high) for shrink in _SHRINKS), key=error)


def round_to(x: Float32, limits: Range, signed: bool = False) -> Float32:
    """``x`` as eight-bit integers give it back."""
    scale, zero = limits.signed() if signed else limits.unsigned()
    low, high = (-128, 127) if signed else (0, 255)
    integer = np.clip(np.rint(x / scale) + np.float32(zero), low, high)
    return np.asarray((integer - np.float32(zero)) * scale, np.float32)


def rounded(weight: Float32) -> Float32:
    """A weight (out, in) as eight-bit integers give it back."""
    values, scale = integers.int8_channels(weight)
    return np.asarray(values * scale[:, None])
