"""What quantization has to know about activations: one pass in full precision over some tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm_export.graph.precision import Range, Recipe
from edge_vlm_export.vision.smoothing import Inputs, choose_factors, clipped_range, observer

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Float32
    from edge_vlm_export.graph.architecture import Stage
    from edge_vlm_export.samples.crops import CalibrationTiles
    from edge_vlm_export.vision.stagewise import StagedTower


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
        state = tower.advance(runner, state, observer(inputs))
        del runner
        if smooth and recipe.precision != "int4":  # which leaves activations as they are
            _smooth(tower, stage, inputs, rows, columns)
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


def _smooth(
    tower: StagedTower,
    stage: Stage,
    inputs: Mapping[str, Inputs],
    rows: dict[str, Float32],
    columns: dict[str, Float32],
) -> None:
    """Decide the moves of one stage."""
    for move in stage.moves:
        readers = [
            (inputs[name], tower.linears[name].weight(tower.tensors)) for name in move.readers
        ]
        factors = choose_factors(readers)
        if factors is None:
            continue
        made = np.ones(move.n_rows or len(factors), np.float32)
        made[slice(*move.rows)] = factors
        rows[move.maker] = made
        columns.update(dict.fromkeys(move.readers, factors))
