"""The order of an export: read and check everything, write beside, verify, rename."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edge_vlm.bundle.manifest import (
    DECODER_NAME,
    MANIFEST_NAME,
    VISION_NAME,
    Bundle,
    FileRecord,
    Manifest,
)
from edge_vlm.bundle.report import MAX_DIVERGENCE, MIN_COSINE, Report
from edge_vlm.errors import CheckpointError, EdgeVLMError, InputError
from edge_vlm_export.checkpoint.new_folder import check_space, check_target, new_folder, size_text
from edge_vlm_export.counted import Counted, Progress
from edge_vlm_export.decoder.quantizer import MIXTURES, quantized_bytes
from edge_vlm_export.families.opened import Description, Model
from edge_vlm_export.graph.onnx_graph import EXTERNAL_DATA_BYTES
from edge_vlm_export.proof.open_check import verify_bundle
from edge_vlm_export.samples.crops import chosen_tiles
from edge_vlm_export.steps.choices import Choices
from edge_vlm_export.steps.decoder_step import DecoderExport
from edge_vlm_export.steps.description import build_manifest, model_identity, record_files, unhashed
from edge_vlm_export.vision.vision_file import largest_bytes, write_vision

OnReport = Callable[[Report], None]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    vision: str = "int8",
    target: str = "cpu",
    static_shapes: bool = False,
    min_cosine: float = MIN_COSINE,
    decoder: str = "q4_k_m",
    decoder_head: str | None = None,
    decoder_embedding: str | None = None,
    calibrate: str | Path | None = None,
    measure: bool | None = None,
    max_divergence: float = MAX_DIVERGENCE,
    allow_loss: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    on_report: OnReport | None = None,
    overwrite: bool = False,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> Path:
    """Write the checkpoint in folder ``checkpoint`` as a bundle to the new folder ``out``.

    ``vision`` to ``max_divergence`` are described at ``choices.Choices``. ``allow_loss`` keeps a
    bundle that loses more. ``name`` is the model's, by default the one the checkpoint tells;
    ``adapter`` a folder with a LoRA adapter to merge into it. ``overwrite`` replaces an existing
    bundle, at the very end, in one step. Vision weights larger than ``external_data_bytes`` go to
    ``vision.onnx.data``. ``progress`` is called with a step, what is done and the total, in bytes
    where files are written or read; what it raises stops the export and leaves nothing behind.
    ``notice`` gets a line about what the export needs, ``on_report`` the report, also if it fails.

    Raises:
        CheckpointError: the checkpoint is incomplete, contradicts itself or is not supported.
        InputError: ``out`` exists, or something else that was given cannot be used.
        EdgeVLMError: writing failed, or the bundle loses more than the limits allow.
    """
    seeing = vision, target, static_shapes, min_cosine
    answering = decoder, decoder_head, decoder_embedding
    choices = Choices(*seeing, *answering, calibrate, measure, max_divergence)
    checkpoint, out = Path(checkpoint), Path(out)
    check_target(out, overwrite)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such checkpoint folder")
    for source, what in ((checkpoint, "checkpoint"), (adapter, "adapter")):
        if source and source.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out}: the {what} itself lies there")
    export = _Export(Model(checkpoint, adapter), name, choices)
    export.announce(out.parent, notice)
    with new_folder(out, overwrite) as folder:
        report, files = export.write(folder, external_data_bytes, progress)
        if on_report:
            on_report(report)
        if report.failures and not allow_loss:
            problems = " and ".join(report.failures)
            raise EdgeVLMError(f"{problems}; nothing was written (--allow-loss keeps it)")
        export.finish(folder, report, files, progress)
    _remember(out)
    return out


class _Export:
    """A checkpoint that was found fit to be exported as is wanted; nothing is written yet."""

    def __init__(self, model: Model, name: str | None, choices: Choices) -> None:
        if name is not None and not 1 <= len(name) <= 200:
            raise InputError("name: expected 1 to 200 characters")
        self.model = model
        if choices.static_shapes and model.settings.image_processor.any_size:
            raise InputError(
                f"static-shapes: pictures of {model.family.name} have any size, so the shapes of"
                " its graph cannot be fixed; leave the option out"
            )
        self.identity = model_identity(model, name)
        self.choices = choices
        self.vision_bytes = largest_bytes(model, choices.vision)
        self.tiles = chosen_tiles(choices.calibrate, model) if choices.measures_vision else None
        self.decoder = DecoderExport(model, choices)

    def announce(self, parent: Path, notice: Callable[[str], None] | None) -> None:
        """Tell what goes to disk and check that there is room for it."""
        total = self.vision_bytes + self.decoder.total_bytes
        if notice:
            base = self.model.adapter and self.model.adapter.config.base
            if base and base not in self.identity.source:
                notice(f"the adapter says that its base is {base}")
            scratch = self.decoder.scratch_bytes
            passing = f", {size_text(scratch)} of it until the decoder is quantized"
            notice(f"needs {size_text(total)} in {parent.resolve()}{passing if scratch else ''}")
        check_space(parent, total)

    def manifest(self, records: dict[str, FileRecord], report: Report | None) -> Manifest:
        """What is known of the bundle."""
        precisions = self.choices.vision, self.choices.decoder
        return build_manifest(self.model, self.identity, records, *precisions, report)

    def write(
        self, folder: Path, external_bytes: int, progress: Progress | None
    ) -> tuple[Report, list[Path]]:
        """Write the two model files and measure them."""
        written = Counted("vision", self.vision_bytes, progress)
        seen = write_vision(
            self.model,
            folder / VISION_NAME,
            self.tiles,
            self.choices.recipe,
            min_cosine=self.choices.min_cosine,
            progress=Counted("fit vision", 0, progress if self.tiles else None).reach,
            written=written,
            external_bytes=external_bytes,
        )
        written.reach(written.total)
        path = folder / DECODER_NAME
        files = [*seen.files, path]

        def so_far() -> Bundle:
            return Bundle(folder, self.manifest(unhashed(files), None))

        stored, answered = self.decoder.write(path, self.identity.name, so_far, progress)
        return Report(vision=seen.report, decoder=answered, decoder_file=stored), files

    def finish(
        self, folder: Path, report: Report, files: list[Path], progress: Progress | None
    ) -> None:
        """Write the manifest and open the bundle."""
        n_written = sum(path.stat().st_size for path in files)
        records = record_files(files, Counted("hash", n_written, progress).reach)
        text = self.manifest(records, report).to_json()
        (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
        verified = Counted("verify", n_written, progress)
        verify_bundle(folder)
        verified(n_written)


def _remember(out: Path) -> None:
    """What was made here need not be tried before it is loaded."""
    from edge_vlm.answering.trial import remember
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.planning.tuning import engines_for

    with suppress(EdgeVLMError):  # the environment's settings may be no good
        bundle, settings = Bundle.open(out), MachineSettings.from_environment()
        remember(bundle, settings, engines_for(bundle.manifest, settings))


def estimated_bytes(folder: Path, vision: str, decoder: str) -> int:
    """About how much an export has on disk at once, by the settings files in ``folder`` alone.

    ``vision`` and ``decoder`` are the precisions; weights and tokenizer may be missing.

    Raises:
        CheckpointError: a settings file is missing, malformed or not supported.
    """
    model = Description(folder)
    shapes, tower = model.shapes(), model.tower
    n_vision = sum(math.prod(shapes[name]) for name in (*tower.shapes(), *tower.unused))
    n_text = sum(map(math.prod, shapes.values())) - n_vision
    tables = 1 if any(model.settings.tie_word_embeddings) else 2
    n_table = tables * model.text.n_ids * model.text.hidden_size
    written = {"fp32": 4, "int4": 1}.get(vision, 2) * n_vision
    written += (4 if decoder == "f32" else 2) * n_text
    return written + (quantized_bytes(decoder, n_text, n_table) if decoder in MIXTURES else 0)
