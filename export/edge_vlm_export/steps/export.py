"""The order of an export: read and check everything, write beside, verify, rename."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.bundle.manifest import (
    DECODER_NAME,
    MANIFEST_NAME,
    VISION_NAME,
    Bundle,
    FileRecord,
    Manifest,
    ModelIdentity,
)
from edge_vlm.bundle.report import MAX_DIVERGENCE, MIN_COSINE, Report
from edge_vlm.errors import CheckpointError, EdgeVLMError, InputError
from edge_vlm_export.checkpoint.new_folder import check_space, check_target, new_folder, size_text
from edge_vlm_export.counted import Counted, Progress
from edge_vlm_export.families.opened import Description, Model
from edge_vlm_export.steps.description import build_manifest, model_identity, record_files, unhashed

if TYPE_CHECKING:
    from edge_vlm_export.steps.choices import DecoderChoice, VisionChoice
    from edge_vlm_export.steps.decoder_step import DecoderExport
    from edge_vlm_export.steps.vision_step import VisionExport

OnReport = Callable[[Report], None]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
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
    external_data_bytes: int | None = None,
) -> Path:
    """Write the checkpoint in folder ``checkpoint`` as a bundle to the new folder ``out``.

    ``vision``, ``target``, ``static_shapes`` and ``min_cosine`` are described at
    ``choices.VisionChoice``, ``decoder``, its head and embedding and ``max_divergence`` at
    ``choices.DecoderChoice``, ``calibrate`` and ``measure`` at both. ``allow_loss`` keeps a bundle
    that loses more than they allow. ``name`` is the model's, by default the one the checkpoint
    tells. ``overwrite`` replaces an existing bundle, at the very end, in one step. Vision weights
    larger than ``external_data_bytes`` go to ``vision.onnx.data``.

    ``progress`` is called with a step, what is done and the total, in bytes where files are written
    or read; an exception it raises stops the export and leaves nothing behind. ``notice`` is called
    with a line about what the export will need, ``on_report`` with the report, also when the export
    fails because of it.

    Returns:
        ``out``.

    Raises:
        CheckpointError: the checkpoint is incomplete, contradicts itself or is not supported.
        InputError: ``out`` exists, or something else that was given cannot be used.
        EdgeVLMError: writing failed, or the bundle loses more than the limits allow.
    """
    # The libraries of the export extra are needed from here on only.
    from edge_vlm_export.steps.choices import DecoderChoice, VisionChoice

    batch = 1 if static_shapes else None
    seeing = VisionChoice(vision, target, batch, min_cosine, calibrate, measure)
    heads = decoder_head, decoder_embedding
    answering = DecoderChoice(decoder, *heads, calibrate, measure, max_divergence)
    export = _Export.plan(Path(checkpoint), Path(out), name, seeing, answering, overwrite)
    export.announce(Path(out).parent, notice)
    return export.write(
        Path(out), overwrite, external_data_bytes, progress, on_report, allow_loss=allow_loss
    )


@dataclass(frozen=True)
class _Export:
    """A checkpoint that was found fit to be exported as is wanted."""

    model: Model
    identity: ModelIdentity
    seeing: VisionExport
    answering: DecoderExport

    @classmethod
    def plan(
        cls,
        checkpoint: Path,
        out: Path,
        name: str | None,
        seeing: VisionChoice,
        answering: DecoderChoice,
        overwrite: bool,
    ) -> _Export:
        """Check all that can be checked before anything is written."""
        from edge_vlm_export.steps.decoder_step import DecoderExport
        from edge_vlm_export.steps.vision_step import VisionExport

        if name is not None and not 1 <= len(name) <= 200:
            raise InputError("name: expected 1 to 200 characters")
        check_target(out, overwrite)
        if not checkpoint.is_dir():
            raise CheckpointError(f"{checkpoint}: no such checkpoint folder")
        if checkpoint.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out}: the checkpoint itself lies there")
        model = Model(checkpoint)
        identity = model_identity(model, name)
        return cls(model, identity, VisionExport(model, seeing), DecoderExport(model, answering))

    def announce(self, parent: Path, notice: Callable[[str], None] | None) -> None:
        """Tell what goes to disk and check that there is room for it."""
        total = self.seeing.total_bytes + self.answering.total_bytes
        if notice:
            scratch = self.answering.scratch_bytes
            passing = f", {size_text(scratch)} of it until the decoder is quantized"
            notice(f"needs {size_text(total)} in {parent.resolve()}{passing if scratch else ''}")
        check_space(parent, total)

    def manifest(self, records: dict[str, FileRecord], report: Report | None) -> Manifest:
        """What is known of the bundle."""
        precisions = self.seeing.choice.precision, self.answering.choice.kind
        return build_manifest(self.model, self.identity, records, *precisions, report)

    def write(
        self,
        out: Path,
        overwrite: bool,
        external_data_bytes: int | None,
        progress: Progress | None,
        on_report: OnReport | None,
        *,
        allow_loss: bool,
    ) -> Path:
        """Write all files beside ``out``, measure and verify them, rename."""
        from edge_vlm_export.proof.open_check import verify_bundle

        with new_folder(out, overwrite) as folder:
            files, seen = self.seeing.write(folder / VISION_NAME, external_data_bytes, progress)

            def so_far() -> Bundle:
                return Bundle(folder, self.manifest(unhashed([*files, path]), None))

            path = folder / DECODER_NAME
            stored, answered = self.answering.write(path, self.identity.name, so_far, progress)
            report = Report(vision=seen, decoder=answered, decoder_file=stored)
            if on_report:
                on_report(report)
            if report.failures and not allow_loss:
                problems = " and ".join(report.failures)
                raise EdgeVLMError(f"{problems}; nothing was written (--allow-loss keeps it)")
            files.append(path)
            n_written = sum(path.stat().st_size for path in files)
            records = record_files(files, Counted("hash", n_written, progress).reach)
            text = self.manifest(records, report).to_json()
            (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
            verified = Counted("verify", n_written, progress)
            verify_bundle(folder)
            verified(n_written)
        return out


def estimated_bytes(folder: Path, vision: str, decoder: str) -> int:
    """About how much an export has on disk at once, by the settings files in ``folder`` alone.

    Args:
        folder: may lack weights and tokenizer.
        vision: precision, as in ``export_checkpoint``.
        decoder: precision, as in ``export_checkpoint``.

    Raises:
        CheckpointError: a settings file is missing, malformed or not supported.
    """
    from edge_vlm_export.decoder.quantizer import MIXTURES, quantized_bytes

    model = Description(folder)
    shapes, tower = model.shapes(), model.tower
    n_vision = sum(math.prod(shapes[name]) for name in (*tower.shapes(), *tower.unused))
    n_text = sum(map(math.prod, shapes.values())) - n_vision
    tables = 1 if any(model.settings.tie_word_embeddings) else 2
    n_table = tables * model.text.n_ids * model.text.hidden_size
    written = {"fp32": 4, "int4": 1}.get(vision, 2) * n_vision
    written += (4 if decoder == "f32" else 2) * n_text
    return written + (quantized_bytes(decoder, n_text, n_table) if decoder in MIXTURES else 0)
