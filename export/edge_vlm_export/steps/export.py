"""The order of an export: read and check everything, write beside, verify, rename."""

from __future__ import annotations

import math
from collections.abc import Callable
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
from edge_vlm_export.checkpoint.new_folder import check_space, check_target, size_text, staged
from edge_vlm_export.counted import Counted, Progress
from edge_vlm_export.families.opened import Description, Model
from edge_vlm_export.steps.description import build_manifest, model_identity, record_files, unhashed


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
    on_report: Callable[[Report], None] | None = None,
    overwrite: bool = False,
    external_data_bytes: int | None = None,
) -> Path:
    """Write the checkpoint in folder ``checkpoint`` as a bundle to the new folder ``out``.

    Args:
        checkpoint: Folder with config, tokenizer and safetensors files.
        out: Folder to create; its parent has to exist.
        vision: Precision of the vision part: int8, int8-static, int4, fp16 or fp32.
        target: Layout of its graph: "cpu" with onnxruntime's fused operators, or "portable".
        static_shapes: Fix its batch to one crop, for engines that want every shape to be a number.
        min_cosine: What its output's mean cosine has to reach; see ``vision_budget``.
        decoder: Type of the decoder's weights: f32, f16, bf16, or one of llama.cpp's mixtures
            q4_k_m, q4_0, q5_k_m, q6_k, q8_0, iq4_xs.
        decoder_head: Type of the output head, by default what the mixture says.
        decoder_embedding: Type of the token table, likewise.
        calibrate: "builtin", or a folder of pictures (see ``calibration.read_samples``): collect an
            importance matrix for the decoder's quantizer, and calibrate the vision part with more
            tiles.
        measure: Compare what was written with the checkpoint; by default what is quantized.
        max_divergence: The largest mean divergence, in nats, that the comparison may find.
        allow_loss: Keep a bundle that loses more than the limits allow.
        name: The model's name, by default the one the checkpoint tells.
        progress: Called with a stage ("vision", "decoder", "examples", "importance", "quantize",
            "compare", "hash", "verify"), what is done and the total, in bytes where files are
            written or read. An exception it raises stops the export and leaves nothing behind.
        notice: Called with a line about what the export will need.
        on_report: Called with the report, also when the export fails because of it.
        overwrite: Replace an existing bundle, at the very end, in one step.
        external_data_bytes: Vision weights larger than this go to ``vision.onnx.data``.

    Returns:
        ``out``.

    Raises:
        CheckpointError: the checkpoint is incomplete, contradicts itself or is not supported.
        InputError: ``out`` exists, or something else that was given cannot be used.
        EdgeVLMError: writing failed, or the bundle loses more than the limits allow.
    """
    # The libraries of the export extra are needed from here on only.
    from edge_vlm_export.proof.open_check import verify_bundle
    from edge_vlm_export.steps.choices import DecoderChoice, VisionChoice
    from edge_vlm_export.steps.decoder_step import DecoderExport
    from edge_vlm_export.steps.vision_step import VisionExport

    checkpoint, out = Path(checkpoint), Path(out)
    batch = 1 if static_shapes else None
    wanted = VisionChoice(vision, target, batch, min_cosine, calibrate, measure)
    choice = DecoderChoice(
        decoder, decoder_head, decoder_embedding, calibrate, measure, max_divergence
    )
    if name is not None and not 1 <= len(name) <= 200:
        raise InputError("name: expected 1 to 200 characters")
    check_target(out, overwrite)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such checkpoint folder")
    if checkpoint.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out}: the checkpoint itself lies there")

    model = Model(checkpoint)
    identity = model_identity(model, name)
    seeing = VisionExport(model, wanted)
    decoding = DecoderExport(model, choice)
    _announce(seeing.total_bytes + decoding.total_bytes, decoding.scratch_bytes, out.parent, notice)

    def manifest(records: dict[str, FileRecord], report: Report | None) -> Manifest:
        return build_manifest(
            model, identity, records, vision=vision, decoder=decoder, report=report
        )

    with staged(out, overwrite) as folder:
        files, vision_report = seeing.write(folder / VISION_NAME, external_data_bytes, progress)

        def so_far() -> Bundle:
            return Bundle(folder, manifest(unhashed([*files, folder / DECODER_NAME]), None))

        decoder_file, decoder_report = decoding.write(folder, identity.name, so_far, progress)
        report = Report(vision=vision_report, decoder=decoder_report, decoder_file=decoder_file)
        if on_report:
            on_report(report)
        if report.failures and not allow_loss:
            raise EdgeVLMError(
                f"{' and '.join(report.failures)}; nothing was written (--allow-loss keeps it)"
            )
        files.append(folder / DECODER_NAME)
        n_written = sum(path.stat().st_size for path in files)
        records = record_files(files, Counted("hash", n_written, progress).reach)
        text = manifest(records, report).to_json()
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


def _announce(total: int, scratch: int, parent: Path, notice: Callable[[str], None] | None) -> None:
    """Tell what goes to disk and check that there is room for it."""
    if notice:
        passing = f", {size_text(scratch)} of it until the decoder is quantized"
        notice(f"needs {size_text(total)} in {parent.resolve()}{passing if scratch else ''}")
    check_space(parent, total)
