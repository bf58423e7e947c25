"""The order of an export: read and check everything, write beside, verify, rename."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from edge_vlm.bundle import DECODER_NAME, MANIFEST_NAME, VISION_NAME
from edge_vlm.errors import CheckpointError, InputError
from edge_vlm.hardware import default_threads
from edge_vlm_export.checkpoint import Checkpoint
from edge_vlm_export.config import read_settings
from edge_vlm_export.layout import check_tensors
from edge_vlm_export.manifest import build_manifest, model_identity, record_files
from edge_vlm_export.quantize import (
    MIXTURES,
    TENSOR_TYPES,
    head_types,
    quantize_decoder,
    quantized_bytes,
)
from edge_vlm_export.staging import check_space, check_target, size_text, staged
from edge_vlm_export.tokenizer import read_tokenizer

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in total


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    vision: str = "fp32",
    decoder: str = "f16",
    decoder_head: str | None = None,
    decoder_embedding: str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    overwrite: bool = False,
    external_data_bytes: int | None = None,
) -> Path:
    """Write the checkpoint in folder ``checkpoint`` as a bundle to the new folder ``out``.

    Args:
        checkpoint: Folder with config, tokenizer and safetensors files.
        out: Folder to create; its parent has to exist.
        vision: Precision of the stored vision weights: fp32 or fp16.
        decoder: Type of the decoder's weights: f32, f16, bf16, or one of llama.cpp's mixtures
            q4_k_m, q4_0, q5_k_m, q6_k, q8_0, iq4_xs.
        decoder_head: Type of the output head, by default what the mixture says.
        decoder_embedding: Type of the token table, likewise.
        name: The model's name, by default the one the checkpoint tells.
        progress: Called with a stage ("vision", "decoder", "quantize", "hash", "verify"), the
            bytes done and the bytes in total. An exception it raises stops the export and leaves
            nothing behind.
        notice: Called with a line about what the export will need.
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
    _check_choice("decoder", decoder, (*decoder_part.UNQUANTIZED, *MIXTURES))
    for option, kind in (("head", decoder_head), ("embedding", decoder_embedding)):
        if kind is not None:
            _check_choice(f"decoder-{option}", kind, TENSOR_TYPES)
            if decoder not in MIXTURES:
                raise InputError(
                    f"decoder-{option}: {decoder} stores every tensor alike; choose one of"
                    f" {', '.join(MIXTURES)}"
                )
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
    quantized = decoder in MIXTURES
    precision = decoder_part.exact_precision(tensors) if quantized else decoder
    outputs = decoder_part.plan_decoder(tensors, settings, tied=tied, precision=precision)
    head, embedding = head_types(tied, settings.text.hidden_size, decoder_head, decoder_embedding)
    sizes = {"vision": graph.n_bytes, "decoder": sum(output.n_bytes for output in outputs)}
    if quantized:
        n_table = (1 if tied else 2) * settings.text.n_ids * settings.text.hidden_size
        n_values = sum(math.prod(output.shape) for output in outputs)
        sizes["quantize"] = quantized_bytes(decoder, n_values, n_table)
    _announce(sizes, out.parent, notice)

    with staged(out, overwrite) as folder:
        files = vision_part.write_vision(
            graph,
            folder / VISION_NAME,
            _Stage("vision", sizes["vision"], progress),
            EXTERNAL_DATA_BYTES if external_data_bytes is None else external_data_bytes,
        )
        unquantized = folder / ("decoder.tmp" if quantized else DECODER_NAME)
        decoder_part.write_decoder(
            unquantized,
            outputs,
            settings,
            tokenizer,
            precision=precision,
            name=identity.name,
            written=_Stage("decoder", sizes["decoder"], progress),
        )
        files.append(folder / DECODER_NAME)
        if quantized:
            quantize_decoder(
                unquantized,
                files[-1],
                decoder,
                threads=default_threads(),
                head=head,
                embedding=embedding,
                progress=_Stage("quantize", sizes["quantize"], progress).reach,
            )
            unquantized.unlink()
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


def _announce(sizes: dict[str, int], parent: Path, notice: Callable[[str], None] | None) -> None:
    """Tell what goes to disk and check that there is room for it."""
    scratch = sizes["decoder"] if "quantize" in sizes else 0
    total = sum(sizes.values())
    if notice:
        passing = f", {size_text(scratch)} of it until the decoder is quantized"
        notice(f"needs {size_text(total)} in {parent.resolve()}{passing if scratch else ''}")
    check_space(parent, total)


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
        self.reach(self.done + n_bytes)

    def reach(self, n_bytes: int) -> None:
        """Report that ``n_bytes`` in all are done; a total that was estimated grows with them."""
        self.done = n_bytes
        self.total = max(self.total, n_bytes)
        if self.progress is not None:
            self.progress(self.name, self.done, self.total)
