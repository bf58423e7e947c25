"""Measuring a finished bundle against the checkpoint it was made from."""

from __future__ import annotations

from pathlib import Path

from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Bundle, Manifest
from edge_vlm.bundle.report import MAX_DIVERGENCE, MIN_COSINE, Report
from edge_vlm.errors import CheckpointError
from edge_vlm.machine.settings import MachineSettings
from edge_vlm_export.counted import Counted, Progress
from edge_vlm_export.families.opened import Model
from edge_vlm_export.proof.decoder_report import (
    decoder_file,
    decoder_report,
    measuring_prompts,
    source_name,
)
from edge_vlm_export.samples.conversations import read_samples
from edge_vlm_export.samples.crops import chosen_tiles
from edge_vlm_export.samples.prompts import PromptMaker
from edge_vlm_export.steps.description import build_manifest
from edge_vlm_export.vision.vision_file import measure_vision


def measure_bundle(
    bundle: Bundle,
    checkpoint: Path,
    *,
    adapter: Path | None = None,
    samples: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """The report of a bundle, measured anew.

    Limits and what only the exporter knows (products kept, calibration) are those of the stored
    report.

    Args:
        bundle: a verified bundle.
        checkpoint: the folder it was exported from.
        adapter: the folder of the LoRA adapter that was merged into it.
        samples: "builtin" or a folder, see ``read_samples``: measure on all its held-out prompts;
            by default on a few built-in ones.
        progress: called with a stage, what is done and the total.

    Raises:
        CheckpointError: the checkpoint is unusable, or another model's.
        InputError: the samples are.
        EdgeVLMError: an engine failed.
    """
    threads = MachineSettings.from_environment().engine_settings().threads
    model, stored = Model(checkpoint, adapter), bundle.manifest.report
    _check_same_model(model, bundle.manifest)
    seen = stored.vision if stored else None
    files = bundle.manifest.files
    vision = measure_vision(
        model,
        bundle.file(VISION_NAME),
        sum(record.size for name, record in files.items() if name.startswith(VISION_NAME)),
        chosen_tiles(samples, model),
        min_cosine=seen.min_cosine if seen else MIN_COSINE,
        kept=seen.kept if seen else (),
        progress=Counted("compare vision", 0, progress).reach,
    )
    gguf = bundle.file(DECODER_NAME)
    examples = Counted("examples", 0, progress)
    with PromptMaker(bundle, threads) as maker:
        chosen = read_samples(samples) if samples else None
        prompts = measuring_prompts(chosen, maker, examples.reach)
    decoder = decoder_report(
        gguf,
        model,
        prompts,
        source=source_name(samples),
        max_divergence=(
            stored.decoder.max_divergence if stored and stored.decoder else MAX_DIVERGENCE
        ),
        threads=threads,
        progress=Counted("compare", 0, progress).reach,
    )
    file = decoder_file(gguf, stored.decoder_file.calibration if stored else None)
    return Report(vision=vision, decoder=decoder, decoder_file=file)


def _check_same_model(model: Model, manifest: Manifest) -> None:
    """Compare what does not depend on precisions and files."""
    precisions = manifest.vision.precision, manifest.decoder.precision
    expected = build_manifest(model, manifest.model, manifest.files, *precisions, None)
    for part in ("family", "decoder", "image_processor", "tokens", "prompt"):
        if getattr(expected, part) != getattr(manifest, part):
            raise CheckpointError(f"{model.folder}: is another model than the bundle's ({part})")
