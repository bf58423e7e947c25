"""A vision tower run stage by stage, so that one stage's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.machine.process import import_onnxruntime
from edge_vlm_export.graph.layers import Layers
from edge_vlm_export.vision.assembly import declare

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32
    from edge_vlm_export.families.opened import Model
    from edge_vlm_export.graph.architecture import Stage
    from edge_vlm_export.graph.precision import Recipe
    from edge_vlm_export.samples.crops import CalibrationTiles
    from edge_vlm_export.vision.calibration import Inputs

_FATAL = 4


@dataclass(frozen=True)
class State:
    """Between two stages: what was written last, and every value that a later stage reads."""

    x: Float32
    values: dict[str, npt.NDArray[Any]]  # (n, ...) by name


class StagedTower:
    """The stages of a checkpoint's vision part."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tensors: Checkpoint = model.tensors
        self.linears = model.tower.linears
        self.stages = model.tower.stages
        self.products = model.tower.products
        self.n_weights = sum(linear.n_out * linear.n_in for linear in self.linears.values())

    def runner(self, stage: Stage, recipe: Recipe) -> StageRunner:
        """A session of one stage; drop it before making the next one."""
        return StageRunner(self, stage, recipe)

    def start(self, tiles: CalibrationTiles) -> State:
        """What the first stage reads."""
        return State(tiles.crops, tiles.feed)

    def advance(self, runner: StageRunner, state: State, seen: Mapping[str, Inputs] = {}) -> State:
        """Run a stage on each tile; returns the state behind it.

        What every product of the stage reads is added to ``seen``.
        """
        stage, outputs = runner.stage, []
        for index in range(len(state.x)):
            feed = {name: state.values[name][index : index + 1] for name in stage.reads}
            output, inputs = runner.run(feed)
            outputs.append(output)
            for product, statistics in seen.items():
                statistics.add(inputs[product])
        values = state.values | {stage.writes: np.concatenate(outputs)}
        later = self.stages[self.stages.index(stage) + 1 :]
        read = {name for following in later for name in following.reads}
        kept = {name: value for name, value in values.items() if name in read}
        return State(values[stage.writes], kept)

    def features(
        self, recipe: Recipe, tiles: CalibrationTiles, done: Callable[[], None] = lambda: None
    ) -> Float32:
        """``image_features`` of the tiles, (n, tokens_per_crop, output_size).

        ``done`` is called after each stage.
        """
        state = self.start(tiles)
        for stage in self.stages:
            state = self.advance(self.runner(stage, recipe), state)
            done()
        return state.x


class StageRunner:
    """An onnxruntime session of one stage."""

    def __init__(self, tower: StagedTower, stage: Stage, recipe: Recipe) -> None:
        self.stage = stage
        layers = Layers(tower.linears, tower.tensors, recipe)
        declare(layers, tower.model, stage.reads)
        stage.add(layers)
        self._reads: Mapping[str, str] = layers.linear.inputs
        # The result first, then what every product reads.
        names = dict.fromkeys((stage.writes, *self._reads.values()))
        self._names = [name for name in names if name not in stage.reads]
        for name in self._names:
            layers.graph.output(name, None)
        self._session = session(layers.graph.in_memory())

    def run(
        self, feed: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
        """The stage's output for one tile, and what each of its products read."""
        values = dict(zip(self._names, self._session.run(self._names, dict(feed)), strict=True))
        values |= feed
        return values[self.stage.writes], {name: values[x] for name, x in self._reads.items()}


def session(model: bytes | str, optimized: bool = True) -> Any:
    """A quiet onnxruntime session for a model in memory or a path."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # gives memory back after each run
    # Small runs with work of our own between them: a thread that waits must not hold a core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
