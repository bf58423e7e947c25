"""``vision.onnx`` in any precision: calibrate, fit the budget, write, measure what was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_vlm.bundle.report import MIN_COSINE
from edge_vlm.errors import EdgeVLMError
from edge_vlm_export.checkpoint.tensors import Float32
from edge_vlm_export.families.model import Model
from edge_vlm_export.graph.onnx_graph import EXTERNAL_DATA_BYTES, Written
from edge_vlm_export.graph.precision import PRECISIONS, QUANTIZED, TARGETS, Range, Recipe
from edge_vlm_export.graph.tower import Stage
from edge_vlm_export.samples.tiles import BUILTIN, CalibrationTiles, calibration_tiles
from edge_vlm_export.vision.budget import Loss, fit, loss
from edge_vlm_export.vision.graph import PRODUCER, build_vision
from edge_vlm_export.vision.smoothing import Inputs, choose_factors, clipped_range, observer
from edge_vlm_export.vision.stages import StagedTower, session

QUICK_TILES = 2  # measured with when no calibration was asked for
CALIBRATION_TILES = 16

Progress = Callable[[int, int], None]  # steps done, steps known so far


@dataclass(frozen=True)
class VisionReport:
    """What was written and how good it is.

    Cosines and errors compare the connector's output for the calibration tiles with full
    precision, token by token; "worst" is the worst hundredth of the tokens.
    """

    precision: str
    target: str
    n_tiles: int
    min_cosine: float
    cosine_mean: float
    cosine_worst: float
    error_mean: float
    error_worst: float
    naive_cosine_mean: float | None  # everything quantized and no channel moved, if measured
    unkept_cosine_mean: float | None  # everything quantized, channels moved
    products: Mapping[str, str]  # precision of every matrix product
    kept: tuple[str, ...]  # those in higher precision than asked for, most sensitive first
    n_smoothed: int  # inputs whose channels were moved
    n_bytes: int  # all files
    n_weights: int
    files: tuple[Path, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bytes of the files, over the weights of all products."""
        return 8 * self.n_bytes / self.n_weights

    @property
    def meets_budget(self) -> bool:
        """Whether mean and worst hundredth are inside the budget."""
        measured = Loss(self.cosine_mean, self.cosine_worst, self.error_mean, self.error_worst)
        return measured.meets(self.min_cosine)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the files are left out."""
        data = asdict(self)
        del data["files"]
        return data | {
            "products": dict(self.products),
            "kept": list(self.kept),
            "bits_per_weight": self.bits_per_weight,
            "meets_budget": self.meets_budget,
        }


def write_vision_quantized(
    model: Model,
    path: Path,
    *,
    precision: str = "int8",
    target: str = "cpu",
    batch: int | None = None,
    calibration: CalibrationTiles | None = None,
    min_cosine: float = MIN_COSINE,
    smooth: bool = True,
    fit_budget: bool = True,
    measure_naive: bool = False,
    progress: Progress = lambda done, total: None,
    written: Written = lambda n_bytes: None,
    external_bytes: int = EXTERNAL_DATA_BYTES,
) -> VisionReport:
    """Write the graph to ``path`` (large weights beside it) and measure it.

    Args:
        model: The checkpoint.
        path: The file to write.
        precision: One of ``PRECISIONS``.
        target: One of ``TARGETS``.
        batch: Number of crops in a run when it is to be fixed.
        calibration: Tiles to calibrate and to measure with; ``QUICK_TILES`` drawn ones by default.
        min_cosine: The budget: see ``vision_budget``.
        smooth: Move outlier channels.
        fit_budget: Keep products in higher precision when the budget asks for it.
        measure_naive: Also measure plain rounding, without either.
        progress: Called with stages run and stages to run, as far as known.
        written: Told the bytes of each weight written.
        external_bytes: Weights larger than this together go to a second file.

    Raises:
        CheckpointError: a tensor cannot be read.
        EdgeVLMError: onnxruntime refuses what was written, which is a fault of the exporter.
    """
    if precision not in PRECISIONS or target not in TARGETS:
        raise ValueError(f"{precision!r}, {target!r}")
    tiles = calibration
    if tiles is None:
        tiles = calibration_tiles(BUILTIN, model, QUICK_TILES)
    tower = StagedTower(model)
    steps = _Steps(len(tower.stages), progress)
    recipe = Recipe(precision, target, batch)
    naive = unkept = None
    sensitivity: Mapping[str, float] = {}
    if precision in QUANTIZED:
        plain = Recipe(precision, target)
        exact, recipe = calibrate(tower, plain, tiles, smooth, steps)
        if measure_naive:
            untouched = calibrate(tower, plain, tiles, False, steps)[1] if smooth else recipe
            naive = loss(tower.features(untouched, tiles, steps), exact).cosine_mean
        if fit_budget:
            found = fit(tower, recipe, tiles, exact, min_cosine, steps)
            recipe, unkept, sensitivity = (
                found.recipe,
                found.before.cosine_mean,
                found.sensitivity,
            )
        recipe = Recipe(**{**recipe.__dict__, "batch": batch})
    else:
        exact = tower.features(Recipe(target="cpu"), tiles, steps)

    graph = build_vision(model, recipe)
    files = graph.save(path, external_bytes, written, PRODUCER)
    measured = _measure(model, path, tiles, exact, batch)
    return VisionReport(
        precision=precision,
        target=target,
        n_tiles=len(tiles),
        min_cosine=min_cosine,
        **asdict(measured),
        naive_cosine_mean=naive,
        unkept_cosine_mean=unkept,
        products={name: recipe.of(name) for name in tower.products},
        kept=tuple(sorted(recipe.kept, key=lambda name: -sensitivity[name])),
        n_smoothed=len(recipe.rows),
        n_bytes=sum(file.stat().st_size for file in files),
        n_weights=tower.n_weights,
        files=tuple(files),
    )


def largest_bytes(model: Model, precision: str) -> int:
    """What the weights of a precision can need on disk, if the budget keeps every product."""
    widest = {"fp32": "fp32", "int4": "int8"}.get(precision, "fp16")
    return int(build_vision(model, widest).n_bytes * 1.1)


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
            (inputs[name], tower.tower.linears[name].weight(tower.tensors)) for name in move.readers
        ]
        factors = choose_factors(readers)
        if factors is None:
            continue
        made = np.ones(move.n_rows or len(factors), np.float32)
        made[slice(*move.rows)] = factors
        rows[move.maker] = made
        columns.update(dict.fromkeys(move.readers, factors))


def measure_file(
    model: Model,
    path: Path,
    tiles: CalibrationTiles,
    progress: Progress = lambda done, total: None,
) -> Loss:
    """Compare a written file with full precision.

    Raises:
        EdgeVLMError: onnxruntime refuses it.
    """
    tower = StagedTower(model)
    steps = _Steps(len(tower.stages), progress)
    exact = tower.features(Recipe(target="cpu"), tiles, steps)
    return _measure(model, path, tiles, exact, None)


def _measure(
    model: Model, path: Path, tiles: CalibrationTiles, exact: Float32, batch: int | None
) -> Loss:
    """Run the written file on the tiles.

    Raises:
        EdgeVLMError: onnxruntime refuses it.
    """
    try:
        written = session(str(path))
        found = []
        for index in range(len(tiles)):
            chosen = [index] * (batch or 1)  # a fixed batch is filled with copies
            feed = {name: values[chosen] for name, values in tiles.feed.items()}
            found.append(written.run(["embeddings"], feed)[0][0])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise EdgeVLMError(f"onnxruntime cannot run the written {path.name} ({error})") from error
    embeddings, added = np.stack(found), model.added_row()
    return loss(embeddings if added is None else embeddings - added[1].read(), exact)


class _Steps:
    """Counts stages; passes over the tower are added to the total as they begin."""

    def __init__(self, n_stages: int, progress: Progress) -> None:
        self.n_stages = n_stages
        self.progress = progress
        self.done = 0

    def __call__(self) -> None:
        self.done += 1
        passes = max(2, -(-self.done // self.n_stages))
        self.progress(self.done, passes * self.n_stages)
