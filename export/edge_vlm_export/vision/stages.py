"""The vision tower run stage by stage, so that one stage's weights are in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_vlm.machine.process import import_onnxruntime
from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32
from edge_vlm_export.families.jina_vlm.config import Settings
from edge_vlm_export.families.jina_vlm.layout import VISION
from edge_vlm_export.families.jina_vlm.tower import Builder
from edge_vlm_export.graph.precision import Recipe
from edge_vlm_export.samples.tiles import CalibrationTiles

CONNECTOR = "connector"
_FATAL = 4


@dataclass(frozen=True)
class Stage:
    """The embedding, a block or the connector, and the products in it."""

    name: str
    products: tuple[str, ...]
    layer: int = -1  # the block's index


@dataclass
class State:
    """Between two stages: what the next one reads, for some tiles."""

    x: Float32  # (n, n_patches, hidden), before the embedding the crops
    used: dict[int, Float32]  # hidden states that the connector will read


class Tower:
    """The stages of a checkpoint's vision part."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        blocks = [
            Stage(
                f"layers.{layer}",
                tuple(
                    f"layers.{layer}.{part}"
                    for part in ("attn.qkv_w", "attn.out", "ffn.up", "ffn.down")
                ),
                layer,
            )
            for layer in range(settings.vision.n_used_layers)
        ]
        pooling, projector = "vl_connector.pooling", "vl_connector.projector"
        connector = (f"{pooling}.q_w", f"{pooling}.kv_w", f"{pooling}.out")
        self.stages = (
            Stage("patch_embed", ("patch_embed.proj",)),
            *blocks,
            Stage(CONNECTOR, (*connector, f"{projector}.up", f"{projector}.down")),
        )

    @property
    def products(self) -> tuple[str, ...]:
        """All products, in the order of computation."""
        return tuple(name for stage in self.stages for name in stage.products)

    def n_weights(self, product: str) -> int:
        """Values of a product's weight."""
        return math.prod(self.checkpoint[f"{VISION}{product}.weight"].shape)

    def runner(self, stage: Stage, recipe: Recipe) -> StageRunner:
        """A session of one stage; drop it before making the next one."""
        return StageRunner(self.checkpoint, self.settings, stage, recipe)

    def start(self, tiles: CalibrationTiles) -> State:
        """What the first stage reads."""
        return State(tiles.crops, {})

    def advance(
        self,
        runner: StageRunner,
        state: State,
        is_last: Any,
        observe: Callable[[Mapping[str, Float32]], None] = lambda inputs: None,
    ) -> State:
        """Run a stage on each tile; returns the state behind it.

        ``observe`` is called for each tile with what every product of the stage read.
        """
        outputs = []
        for index in range(len(state.x)):
            output, inputs = runner.run(
                state.x[index : index + 1],
                {layer: x[index : index + 1] for layer, x in state.used.items()},
                is_last[index : index + 1],
            )
            outputs.append(output)
            observe(inputs)
        x = np.concatenate(outputs)
        used = dict(state.used)
        layer = runner.stage.layer
        vision = self.settings.vision
        if layer in vision.used_states or (vision.uses_final_norm and layer == vision.n_layers - 1):
            used[layer] = x
        return State(x, used)

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
            state = self.advance(self.runner(stage, recipe), state, tiles.is_last)
            done()
        return state.x


class StageRunner:
    """An onnxruntime session of one stage."""

    def __init__(
        self, checkpoint: Checkpoint, settings: Settings, stage: Stage, recipe: Recipe
    ) -> None:
        self.stage = stage
        self._vision = settings.vision
        builder = Builder(checkpoint, settings, recipe)
        if stage.name == CONNECTOR:
            graph = builder.connector()
        elif stage.layer >= 0:
            graph = builder.block(stage.layer)
        else:
            graph = builder.embedding()
        self._input = graph.inputs[0].name
        self._reads: Mapping[str, str] = builder.linear.inputs
        self._session = session(graph.in_memory())
        self._names = [value.name for value in self._session.get_outputs()]
        self._norm = None
        if stage.name == CONNECTOR and self._vision.uses_final_norm:
            norm = Builder(checkpoint, settings, Recipe()).final_norm()
            self._norm = session(norm.in_memory())

    def run(
        self, x: Float32, used: Mapping[int, Float32], is_last: Any
    ) -> tuple[Float32, dict[str, Float32]]:
        """The stage's output for one tile, and what each of its products read."""
        feed: dict[str, Any] = {self._input: x}
        if self.stage.name == CONNECTOR:
            feed = {self._input: self._features(used), "is_last": is_last}
        values = dict(zip(self._names, self._session.run(None, feed), strict=True))
        output = values[self._names[0]]
        values |= feed
        return output, {product: values[name] for product, name in self._reads.items()}

    def _features(self, used: Mapping[int, Float32]) -> Float32:
        states = []
        for index in self._vision.used_states:
            if index < self._vision.n_layers:
                states.append(used[index])
            else:
                assert self._norm is not None  # noqa: S101
                states.append(self._norm.run(None, {"x": used[index - 1]})[0])
        return np.concatenate(states, axis=-1)


def session(model: bytes | str) -> Any:
    """A quiet onnxruntime session for a model in memory or a path."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.enable_cpu_mem_arena = False  # gives memory back after each run
    # Small runs with work of our own between them: a thread that waits must not hold a core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
