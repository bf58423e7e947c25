"""Keeping the loss of quantization inside a budget, with as few exceptions as possible.

All products are quantized first and the result is compared with full precision. Only when it loses
too much, each product is quantized alone, the rest of the tower runs in full precision, and the
loss at the connector's output is measured: its sensitivity. The most sensitive ones are then kept
in higher precision, as few as the budget needs; that is found by measuring, not by the sum of
sensitivities, which only says where to look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm_export.graph.precision import HIGHER, Recipe

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Float32
    from edge_vlm_export.samples.crops import CalibrationTiles
    from edge_vlm_export.vision.stagewise import StagedTower, State

# The worst hundredth of the tokens may be this many times as far from 1 as the mean.
WORST_FACTOR = 4
WORST_PERCENT = 1
_MAX_MEASUREMENTS = 12

Step = Callable[[], None]


@dataclass(frozen=True)
class Loss:
    """How far embeddings are from those of full precision, over all tokens of all tiles."""

    cosine_mean: float
    cosine_worst: float  # of the worst hundredth
    error_mean: float  # length of the difference, relative to the exact vector's
    error_worst: float

    def meets(self, min_cosine: float) -> bool:
        """Whether mean and worst hundredth are inside the budget."""
        worst = self.least_worst(min_cosine)
        return self.cosine_mean >= min_cosine and self.cosine_worst >= worst

    @staticmethod
    def least_worst(min_cosine: float) -> float:
        """What the worst hundredth has to reach."""
        return max(-1.0, 1 - WORST_FACTOR * (1 - min_cosine))

    def excess(self, min_cosine: float) -> float:
        """The loss in units of the budget: at most 1 when it is met."""
        allowed = max(1 - min_cosine, 1e-9)
        return max(1 - self.cosine_mean, (1 - self.cosine_worst) / WORST_FACTOR) / allowed


def loss(found: Float32, exact: Float32) -> Loss:
    """Compare vectors (..., size)."""
    a = found.reshape(-1, found.shape[-1]).astype(np.float64)
    b = exact.reshape(-1, exact.shape[-1]).astype(np.float64)
    length = np.maximum(np.linalg.norm(b, axis=1), 1e-30)
    cosine = (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1), 1e-30) / length
    error = np.linalg.norm(a - b, axis=1) / length
    return Loss(
        float(cosine.mean()),
        float(np.percentile(cosine, WORST_PERCENT)),
        float(error.mean()),
        float(np.percentile(error, 100 - WORST_PERCENT)),
    )


@dataclass(frozen=True)
class Found:
    """What the search chose."""

    recipe: Recipe
    before: Loss  # everything quantized
    after: Loss
    sensitivity: Mapping[str, float]  # 1 - mean cosine with this product alone quantized

    @property
    def kept(self) -> tuple[str, ...]:
        """Products in higher precision, the most sensitive first."""
        return tuple(sorted(self.recipe.kept, key=lambda name: -self.sensitivity[name]))


def fit(
    tower: StagedTower,
    recipe: Recipe,
    tiles: CalibrationTiles,
    exact: Float32,
    min_cosine: float,
    step: Step = lambda: None,
) -> Found:
    """Keep as few products as needed in higher precision.

    ``exact`` is the output in full precision; ``step`` is called after every stage that was run.
    When even all of them do not suffice, the recipe with all of them is returned.
    """

    def keeping(kept: Sequence[str]) -> Recipe:
        return recipe.keeping(dict.fromkeys(kept, HIGHER[recipe.precision]))

    def measure(kept: Sequence[str]) -> Loss:
        return loss(tower.features(keeping(kept), tiles, step), exact)

    before = measure([])
    if before.meets(min_cosine):
        return Found(recipe, before, before, {})
    one = tiles.first(1)
    sensitivity = sensitivities(tower, recipe, one, exact[:1], step)
    order = sorted(sensitivity, key=lambda name: -sensitivity[name])
    shares = np.cumsum([sensitivity[name] for name in order]) / sum(sensitivity.values())

    # Between `short`, which is known not to suffice, and `enough`, which is known to.
    short, enough = 0, len(order)
    results = {0: before}
    # As many of the most sensitive as would do if losses simply added up.
    n_kept = int(np.searchsorted(shares, 1 - 1 / before.excess(min_cosine))) + 1
    while enough - short > 1 and len(results) < _MAX_MEASUREMENTS:
        n_kept = min(max(n_kept, short + 1), enough - 1)
        results[n_kept] = measure(order[:n_kept])
        if results[n_kept].meets(min_cosine):
            enough = n_kept
            # Fewer may do: believe the sensitivities first, halve the rest after that.
            n_kept = enough - 1 if enough - short <= 3 else (short + enough) // 2
        else:
            short = n_kept
            n_kept = short + max(1, (enough - short) // 4)
    if enough not in results:
        results[enough] = measure(order[:enough])
    return Found(keeping(order[:enough]), before, results[enough], sensitivity)


def sensitivities(
    tower: StagedTower,
    recipe: Recipe,
    tiles: CalibrationTiles,
    exact: Float32,
    step: Step = lambda: None,
) -> dict[str, float]:
    """1 - mean cosine at the output with one product quantized and all others exact.

    One pass over the stages: the states with an error from an earlier stage travel along with the
    exact one, so every stage's weights are read once.
    """
    products = tower.products
    exact_recipe = recipe.keeping(dict.fromkeys(products, "fp32"))
    base = tower.start(tiles)
    disturbed: dict[str, State] = {}
    for stage in tower.stages:
        runner = tower.runner(stage, exact_recipe)
        after = {name: tower.advance(runner, state) for name, state in disturbed.items()}
        following = tower.advance(runner, base)
        del runner
        for name in stage.products:
            others = {other: "fp32" for other in products if other != name}
            alone = tower.runner(stage, recipe.keeping(others))
            after[name] = tower.advance(alone, base)
            del alone
        base, disturbed = following, after
        step()
    return {name: 1 - loss(state.x, exact).cosine_mean for name, state in disturbed.items()}
