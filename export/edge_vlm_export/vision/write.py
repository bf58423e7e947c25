"""The vision part of an export: written in any precision, and measured."""

from __future__ import annotations

from pathlib import Path

from edge_vlm.bundle.report import VisionReport
from edge_vlm_export.families.model import Model
from edge_vlm_export.graph.onnx_graph import EXTERNAL_DATA_BYTES
from edge_vlm_export.graph.precision import QUANTIZED, Recipe
from edge_vlm_export.samples.tiles import BUILTIN, calibration_tiles
from edge_vlm_export.steps.progress import Progress, Stage
from edge_vlm_export.vision.budget import Loss
from edge_vlm_export.vision.graph import PRODUCER, build_vision
from edge_vlm_export.vision.quantization import (
    CALIBRATION_TILES,
    QUICK_TILES,
    largest_bytes,
    write_vision_quantized,
)


class VisionExport:
    """Plans the vision file when made; ``write`` carries it out.

    Raises:
        InputError: the calibration folder cannot be used.
    """

    def __init__(
        self,
        model: Model,
        *,
        precision: str,
        target: str,
        batch: int | None = None,
        min_cosine: float,
        calibrate: str | Path | None,
        measure: bool | None,
    ) -> None:
        self._model = model
        self._precision, self._target, self._min_cosine = precision, target, min_cosine
        self._batch = batch
        self._measured = precision in QUANTIZED or bool(measure)
        self.total_bytes = largest_bytes(model, precision)
        self._tiles = (
            calibration_tiles(
                calibrate or BUILTIN,
                model,
                CALIBRATION_TILES if calibrate else QUICK_TILES,
            )
            if self._measured
            else None
        )

    def write(
        self, path: Path, external_bytes: int | None, progress: Progress | None
    ) -> tuple[list[Path], VisionReport | None]:
        """Write the graph to ``path`` (large weights beside it) and measure it.

        Raises:
            CheckpointError: a tensor cannot be read or does not fit the precision.
            EdgeVLMError: onnxruntime refuses what was written.
        """
        limit = EXTERNAL_DATA_BYTES if external_bytes is None else external_bytes
        written = Stage("vision", self.total_bytes, progress)
        if self._tiles is None:
            recipe = Recipe(self._precision, self._target, self._batch)
            files = build_vision(self._model, recipe).save(path, limit, written, PRODUCER)
            written.reach(written.total)
            return files, None
        found = write_vision_quantized(
            self._model,
            path,
            precision=self._precision,
            target=self._target,
            batch=self._batch,
            calibration=self._tiles,
            min_cosine=self._min_cosine,
            progress=Stage("fit vision", 0, progress).reach,
            written=written,
            external_bytes=limit,
        )
        written.reach(written.total)
        return list(found.files), vision_report(
            Loss(found.cosine_mean, found.cosine_worst, found.error_mean, found.error_worst),
            n_tiles=found.n_tiles,
            min_cosine=self._min_cosine,
            n_bytes=found.n_bytes,
            n_weights=found.n_weights,
            n_products=len(found.products),
            kept=found.kept,
        )


def vision_report(
    found: Loss,
    *,
    n_tiles: int,
    min_cosine: float,
    n_bytes: int,
    n_weights: int,
    n_products: int,
    kept: tuple[str, ...],
) -> VisionReport:
    """What was measured, in the form of the manifest."""
    return VisionReport(
        n_tiles=n_tiles,
        cosine_mean=_cosine(found.cosine_mean),
        cosine_worst=_cosine(found.cosine_worst),
        error_mean=float(found.error_mean),
        error_worst=float(found.error_worst),
        min_cosine=min_cosine,
        min_cosine_worst=Loss.least_worst(min_cosine),
        n_bytes=n_bytes,
        bits_per_weight=8 * n_bytes / n_weights,
        n_products=n_products,
        kept=kept,
    )


def _cosine(value: float) -> float:
    """Rounding can carry one past its range."""
    return min(1.0, max(-1.0, float(value)))
