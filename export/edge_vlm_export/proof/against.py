"""Measuring a finished bundle against the checkpoint it was made from."""

from __future__ import annotations

from pathlib import Path

from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Bundle
from edge_vlm.bundle.report import MAX_DIVERGENCE, MIN_COSINE, Report
from edge_vlm.errors import CheckpointError
from edge_vlm.machine.settings import MachineSettings
from edge_vlm_export.decoder.quantizer import stored_tensors
from edge_vlm_export.families.model import Model
from edge_vlm_export.proof.prompts import PromptMaker
from edge_vlm_export.proof.report import (
    decoder_file,
    decoder_report,
    measuring_prompts,
    source_name,
)
from edge_vlm_export.samples.conversations import BUILTIN, read_samples
from edge_vlm_export.samples.tiles import calibration_tiles
from edge_vlm_export.steps.manifest import build_manifest
from edge_vlm_export.steps.progress import Progress, Stage
from edge_vlm_export.vision.quantization import CALIBRATION_TILES, QUICK_TILES, measure_file
from edge_vlm_export.vision.stages import StagedTower
from edge_vlm_export.vision.write import vision_report

_SAME = ("image_processor", "tokens", "prompt")


def measure_bundle(
    bundle: Bundle,
    checkpoint: Path,
    *,
    samples: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """The report of a bundle, measured anew.

    Limits and what only the exporter knows (products kept, calibration) are those of the stored
    report.

    Args:
        bundle: a verified bundle.
        checkpoint: the folder it was exported from.
        samples: "builtin" or a folder, see ``calibration.read_samples``: measure on all its
            held-out prompts; by default on a few built-in ones.
        progress: called with a stage, what is done and the total.

    Raises:
        CheckpointError: the checkpoint is unusable, or another model's.
        InputError: the samples are.
        EdgeVLMError: an engine failed.
    """
    threads = MachineSettings.from_environment().engine_settings().threads
    model = Model(checkpoint)
    manifest, stored = bundle.manifest, bundle.manifest.report
    expected = build_manifest(
        model,
        manifest.model,
        manifest.files,
        vision=manifest.vision.precision,
        decoder=manifest.decoder.precision,
        report=None,
    )
    if manifest.family != model.family.name:
        raise CheckpointError(f"{checkpoint}: is another model than the bundle's (family)")
    for part in ("decoder", *_SAME):
        if getattr(expected, part) != getattr(manifest, part):
            raise CheckpointError(f"{checkpoint}: is another model than the bundle's ({part})")

    tiles = calibration_tiles(
        samples or BUILTIN, model, CALIBRATION_TILES if samples else QUICK_TILES
    )
    vision_files = [name for name in manifest.files if name.startswith(VISION_NAME)]
    tower = StagedTower(model)
    seen = stored.vision if stored else None
    vision = vision_report(
        measure_file(
            model,
            bundle.file(VISION_NAME),
            tiles,
            Stage("compare vision", 0, progress).reach,
        ),
        n_tiles=len(tiles),
        min_cosine=seen.min_cosine if seen else MIN_COSINE,
        n_bytes=sum(manifest.files[name].size for name in vision_files),
        n_weights=tower.n_weights,
        n_products=len(tower.products),
        kept=seen.kept if seen else (),
    )
    gguf = bundle.file(DECODER_NAME)
    examples = Stage("examples", 0, progress)
    with PromptMaker(bundle, gguf, model.settings.chat_template, threads) as maker:
        chosen = read_samples(samples) if samples else None
        prompts = measuring_prompts(chosen, maker, examples.reach)
    limit = stored.decoder.max_divergence if stored and stored.decoder else MAX_DIVERGENCE
    decoder = decoder_report(
        gguf,
        model,
        prompts,
        source=source_name(samples),
        max_divergence=limit,
        threads=threads,
        progress=Stage("compare", 0, progress).reach,
    )
    calibration = stored.decoder_file.calibration if stored else None
    file = decoder_file(manifest.files[DECODER_NAME].size, stored_tensors(gguf), calibration)
    return Report(vision=vision, decoder=decoder, decoder_file=file)
