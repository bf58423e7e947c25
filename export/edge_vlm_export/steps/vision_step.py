"""The vision part of an export: written in any precision, and measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm_export.counted import Counted, Progress
from edge_vlm_export.graph.onnx_graph import EXTERNAL_DATA_BYTES
from edge_vlm_export.graph.precision import Recipe
from edge_vlm_export.samples.crops import chosen_tiles
from edge_vlm_export.vision.assembly import PRODUCER, build_vision
from edge_vlm_export.vision.vision_file import largest_bytes, write_vision

if TYPE_CHECKING:
    from edge_vlm.bundle.report import VisionReport
    from edge_vlm_export.families.opened import Model
    from edge_vlm_export.steps.choices import VisionChoice


class VisionExport:
    """Plans the vision file when made; ``write`` carries it out.

    Raises:
        InputError: the calibration folder cannot be used.
    """

    def __init__(self, model: Model, choice: VisionChoice) -> None:
        self._model, self.choice = model, choice
        self.total_bytes = largest_bytes(model, choice.precision)
        self._tiles = chosen_tiles(choice.calibrate, model) if choice.measured else None

    def write(
        self, path: Path, external_bytes: int | None, progress: Progress | None
    ) -> tuple[list[Path], VisionReport | None]:
        """Write the graph to ``path`` (large weights beside it) and measure it.

        Raises:
            CheckpointError: a tensor cannot be read or does not fit the precision.
            EdgeVLMError: onnxruntime refuses what was written.
        """
        choice, report = self.choice, None
        limit = EXTERNAL_DATA_BYTES if external_bytes is None else external_bytes
        written = Counted("vision", self.total_bytes, progress)
        if self._tiles is None:
            recipe = Recipe(choice.precision, choice.target, choice.batch)
            files = build_vision(self._model, recipe).save(path, limit, written, PRODUCER)
        else:
            found = write_vision(
                self._model,
                path,
                self._tiles,
                precision=choice.precision,
                target=choice.target,
                batch=choice.batch,
                min_cosine=choice.min_cosine,
                progress=Counted("fit vision", 0, progress).reach,
                written=written,
                external_bytes=limit,
            )
            files, report = found.files, found.report
        written.reach(written.total)
        return files, report
