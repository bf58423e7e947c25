"""``vision.onnx`` in any precision: calibrate, fit the budget, write, measure what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.bundle.report import MIN_COSINE, VisionReport
from edge_vlm.errors import EdgeVLMError
from edge_vlm_export.graph.onnx_graph import EXTERNAL_DATA_BYTES, Written
from edge_vlm_export.graph.precision import QUANTIZED, Recipe
from edge_vlm_export.vision.assembly import PRODUCER, build_vision
from edge_vlm_export.vision.calibration import calibrate
from edge_vlm_export.vision.error_budget import Loss, fit, loss
from edge_vlm_export.vision.stagewise import StagedTower, session

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Float32
    from edge_vlm_export.families.opened import Model
    from edge_vlm_export.samples.crops import CalibrationTiles

Progress = Callable[[int, int], None]  # stages done, stages known so far


@dataclass(frozen=True)
class VisionFile:
    """What was written, and how good it is."""

    files: list[Path]
    recipe: Recipe  # as found: with the products that are kept, channels moved
    unkept: Loss | None  # of everything quantized, channels moved
    report: VisionReport | None


def write_vision(
    model: Model,
    path: Path,
    tiles: CalibrationTiles | None,
    recipe: Recipe,
    *,
    min_cosine: float = MIN_COSINE,
    fit_budget: bool = True,
    progress: Progress = lambda done, total: None,
    written: Written = lambda n_bytes: None,
    external_bytes: int = EXTERNAL_DATA_BYTES,
) -> VisionFile:
    """Write the graph to ``path`` and measure it.

    Args:
        model: The checkpoint.
        path: The file; weights larger than ``external_bytes`` together go to one beside it.
        tiles: To calibrate and to measure with; without them nothing is measured, and only what
            needs no calibration can be written.
        recipe: Precision, target, and the number of crops in a run when it is to be fixed.
        min_cosine: The budget: see ``error_budget``.
        fit_budget: Keep products in higher precision when the budget asks for it.
        progress: Called with stages run and stages to run, as far as known.
        written: Told the bytes of each weight written.
        external_bytes: See ``path``.

    Raises:
        CheckpointError: a tensor cannot be read or does not fit the precision.
        EdgeVLMError: onnxruntime refuses what was written, which is a fault of the exporter.
    """
    if tiles is None:
        files = build_vision(model, recipe).save(path, external_bytes, written, PRODUCER)
        return VisionFile(files, recipe, None, None)
    tower, batch = StagedTower(model), recipe.batch
    steps = _counter(len(tower.stages), progress)
    unkept: Loss | None = None
    kept: tuple[str, ...] = ()
    if recipe.precision in QUANTIZED:
        exact, recipe = calibrate(tower, replace(recipe, batch=None), tiles, True, steps)
        if fit_budget:
            found = fit(tower, recipe, tiles, exact, min_cosine, steps)
            recipe, unkept, kept = found.recipe, found.before, found.kept
    else:
        exact = tower.features(Recipe(target="cpu"), tiles, steps)
    graph = build_vision(model, replace(recipe, batch=batch))
    files = graph.save(path, external_bytes, written, PRODUCER)
    n_bytes = sum(file.stat().st_size for file in files)
    report = _report(tower, path, n_bytes, tiles, exact, min_cosine, kept, batch or 1)
    return VisionFile(files, recipe, unkept, report)


def largest_bytes(model: Model, precision: str) -> int:
    """What the weights of a precision can need on disk, if the budget keeps every product."""
    widest = {"fp32": "fp32", "int4": "int8"}.get(precision, "fp16")
    return int(build_vision(model, Recipe(widest)).n_bytes * 1.1)


def measure_vision(
    model: Model,
    path: Path,
    n_bytes: int,
    tiles: CalibrationTiles,
    *,
    min_cosine: float,
    kept: tuple[str, ...],
    progress: Progress = lambda done, total: None,
) -> VisionReport:
    """Compare a written file with full precision.

    Raises:
        EdgeVLMError: onnxruntime refuses it.
    """
    tower = StagedTower(model)
    steps = _counter(len(tower.stages), progress)
    exact = tower.features(Recipe(target="cpu"), tiles, steps)
    return _report(tower, path, n_bytes, tiles, exact, min_cosine, kept)


def _report(
    tower: StagedTower,
    path: Path,
    n_bytes: int,
    tiles: CalibrationTiles,
    exact: Float32,
    min_cosine: float,
    kept: tuple[str, ...],
    batch: int = 1,
) -> VisionReport:
    """Run the written file on the tiles; a fixed batch is filled with copies."""
    try:
        written = session(str(path))
        found = []
        for index in range(len(tiles)):
            feed = {name: values[[index] * batch] for name, values in tiles.feed.items()}
            found.append(written.run(["embeddings"], feed)[0][0])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise EdgeVLMError(f"onnxruntime cannot run the written {path.name} ({error})") from error
    embeddings, added = np.stack(found), tower.model.added_row()
    lost = loss(embeddings if added is None else embeddings - added[1].read(), exact)
    return VisionReport(
        n_tiles=len(tiles),
        # Rounding can carry a cosine past its range.
        cosine_mean=min(1.0, max(-1.0, lost.cosine_mean)),
        cosine_worst=min(1.0, max(-1.0, lost.cosine_worst)),
        error_mean=lost.error_mean,
        error_worst=lost.error_worst,
        min_cosine=min_cosine,
        min_cosine_worst=Loss.least_worst(min_cosine),
        n_bytes=n_bytes,
        bits_per_weight=8 * n_bytes / tower.n_weights,
        n_products=len(tower.products),
        kept=kept,
    )


def _counter(n_stages: int, progress: Progress) -> Callable[[], None]:
    """Counts stages; passes over the tower are added to the total as they begin."""
    stages = count(1)

    def step() -> None:
        done = next(stages)
        progress(done, max(2, -(-done // n_stages)) * n_stages)

    return step
