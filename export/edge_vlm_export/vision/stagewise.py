"""A vision tower run stage by stage, so that one stage's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.machine.process import import_onnxruntime
from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32
from edge_vlm_export.graph.architecture import CROPS, Stage, Tower
from edge_vlm_export.graph.layers import Layers
from edge_vlm_export.vision.assembly import declare

if TYPE_CHECKING:
    from edge_vlm_export.families.opened import Model
    from edge_vlm_export.graph.precision import Recipe
    from edge_vlm_export.samples.crops import CalibrationTiles

_FATAL = 4
Observe = Callable[[Mapping[str, Float32]], None]


@dataclass
class State:
    """Between two stages: every value that a later one reads, for some tiles."""

    values: dict[str, npt.NDArray[Any]] = field(default_factory=dict)  # (n, ...) by name
    latest: str = CROPS

    @property
    def x(self) -> Float32:
        """What the last stage wrote."""
        return self.values[self.latest]


class StagedTower:
    """The stages of a checkpoint's vision part."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tower: Tower = model.tower
        self.tensors: Checkpoint = model.tensors

    @property
    def stages(self) -> tuple[Stage, ...]:
        """In the order of computation."""
        return self.tower.stages

    @property
    def products(self) -> tuple[str, ...]:
        """All products, in the order of computation."""
        return self.tower.products

    @property
    def n_weights(self) -> int:
        """Values of all products' weights."""
        return sum(self.tower.linears[name].n_weights for name in self.products)

    def runner(self, stage: Stage, recipe: Recipe) -> StageRunner:
        """A session of one stage; drop it before making the next one."""
        return StageRunner(self, stage, recipe)

    def start(self, tiles: CalibrationTiles) -> State:
        """What the first stage reads."""
        return State({CROPS: tiles.crops, **tiles.extras})

    def advance(
        self, runner: StageRunner, state: State, observe: Observe = lambda inputs: None
    ) -> State:
        """Run a stage on each tile; returns the state behind it.

        ``observe`` is called for each tile with what every product of the stage read.
        """
        outputs = []
        for index in range(len(state.x)):
            feed = {name: state.values[name][index : index + 1] for name in runner.stage.reads}
            output, inputs = runner.run(feed)
            outputs.append(output)
            observe(inputs)
        later = self.stages[self.stages.index(runner.stage) + 1 :]
        read = {name for stage in later for name in stage.reads}
        values = {name: value for name, value in state.values.items() if name in read}
        latest = runner.stage.writes
        return State({**values, latest: np.concatenate(outputs)}, latest)

    def features(
        self,
        recipe: Recipe,
        tiles: CalibrationTiles,
        done: Callable[[], None] = lambda: None,
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
        layers = Layers(tower.tower.linears, tower.tensors, recipe)
        declare(layers, tower.model, stage.reads)
        stage.add(layers)
        self._reads: Mapping[str, str] = layers.linear.inputs
        # The result first, then what every product reads.
        self._names = [n for n in (stage.writes, *self._reads.values()) if n not in stage.reads]
        self._names = list(dict.fromkeys(self._names))
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


def session(model: bytes | str) -> Any:
    """A quiet onnxruntime session for a model in memory or a path."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.enable_cpu_mem_arena = False  # gives memory back after each run
    # Small runs with work of our own between them: a thread that waits must not hold a core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
