"""The order of an export: read and check everything, write beside, verify, rename."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_vlm.bundle import DECODER_NAME, MANIFEST_NAME, VISION_NAME
from edge_vlm.errors import CheckpointError, InputError
from edge_vlm_export.checkpoint import Checkpoint
from edge_vlm_export.config import read_settings
from edge_vlm_export.layout import check_tensors
from edge_vlm_export.manifest import build_manifest, model_identity, record_files
from edge_vlm_export.staging import check_space, check_target, staged
from edge_vlm_export.tokenizer import read_tokenizer

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in total


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    vision: str = "fp32",
    decoder: str = "f16",
    name: str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    external_data_bytes: int | None = None,
) -> Path:
    """Write the checkpoint in folder ``checkpoint`` as a bundle to the new folder ``out``.

    Args:
        checkpoint: Folder with config, tokenizer and safetensors files.
        out: Folder to create; its parent has to exist.
        vision: Precision of the stored vision weights: fp32 or fp16.
        decoder: Precision of the stored decoder weights: f32, f16 or bf16.
        name: The model's name, by default the one the checkpoint tells.
        progress: Called with a stage ("vision", "decoder", "hash", "verify"), the bytes done and
            the bytes in total. An exception it raises stops the export and leaves nothing behind.
        overwrite: Replace an existing bundle, at the very end, in one step.
        external_data_bytes: Vision weights larger than this go to ``vision.onnx.data``.

    Returns:
        ``out``.

    Raises:
        CheckpointError: the checkpoint is incomplete, contradicts itself or is not supported.
        InputError: ``out`` exists, or something else that was given cannot be used.
        EdgeVLMError: writing failed.
    """
    # The libraries of the export extra are needed from here on only.
    from edge_vlm_export import decoder as decoder_part
    from edge_vlm_export import vision as vision_part
    from edge_vlm_export.onnx_graph import EXTERNAL_DATA_BYTES
    from edge_vlm_export.verify import verify_bundle

    checkpoint, out = Path(checkpoint), Path(out)
    _check_choice("vision", vision, vision_part.PRECISIONS)
    _check_choice("decoder", decoder, decoder_part.PRECISIONS)
    if name is not None and not 1 <= len(name) <= 200:
        raise InputError("name: expected 1 to 200 characters")
    check_target(out, overwrite)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such checkpoint folder")
    if checkpoint.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out}: the checkpoint itself lies there")

    settings = read_settings(checkpoint)
    tensors = Checkpoint.open(checkpoint)
    tied = check_tensors(tensors, settings)
    tokenizer = read_tokenizer(checkpoint, settings)
    identity = model_identity(checkpoint, settings, name)

    graph = vision_part.build_vision(tensors, settings, tokenizer.special, vision)
    outputs = decoder_part.plan_decoder(tensors, settings, tied=tied, precision=decoder)
    sizes = {"vision": graph.n_bytes, "decoder": sum(output.n_bytes for output in outputs)}
    check_space(out.parent, sum(sizes.values()))

    with staged(out, overwrite) as folder:
        files = vision_part.write_vision(
            graph,
            folder / VISION_NAME,
            _Stage("vision", sizes["vision"], progress),
            EXTERNAL_DATA_BYTES if external_data_bytes is None else external_data_bytes,
        )
        files.append(folder / DECODER_NAME)
        decoder_part.write_decoder(
            files[-1],
            outputs,
            settings,
            tokenizer,
            precision=decoder,
            name=identity.name,
            written=_Stage("decoder", sizes["decoder"], progress),
        )
        n_written = sum(path.stat().st_size for path in files)
        records = record_files(files, _Stage("hash", n_written, progress))
        manifest = build_manifest(
            settings, tokenizer, identity, records, vision=vision, decoder=decoder, tied=tied
        )
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        verified = _Stage("verify", n_written, progress)
        verify_bundle(folder)
        verified(n_written)
    return out


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{option}: {value!r} is none of {', '.join(choices)}")


class _Stage:
    """Counts the bytes of one stage and reports them."""

    def __init__(self, name: str, total: int, progress: Progress | None) -> None:
        self.name = name
        self.total = total
        self.progress = progress
        self.done = 0
        self(0)

    def __call__(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.progress is not None:
            self.progress(self.name, self.done, self.total)
