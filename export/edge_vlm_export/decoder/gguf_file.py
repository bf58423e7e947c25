"""``decoder.gguf``: the language model for llama.cpp, tokenizer and template included.

The token table may have rows of additional ids, which stand for parts of a picture: they can be
read, never generated. llama.cpp wants an output head of the same number of rows and has no output
bias to switch rows off, so three things together keep the additional ids out of an answer: an
untied head repeats the row of the last vocabulary id where it has none for them (greedy choice
takes the first of equals), ``tokenizer.ggml.suppress_tokens`` names them for programs that honour
it, and edge-vlm's own sampling masks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt

from edge_vlm_export.graph.onnx_graph import to_half

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Values
    from edge_vlm_export.families.opened import Model

UNQUANTIZED = ("f32", "f16", "bf16")
SUPPRESS_TOKENS = "tokenizer.ggml.suppress_tokens"  # llama.cpp since 2026; ignored before


@dataclass(frozen=True)
class Output:
    """One tensor of the GGUF."""

    name: str
    values: Values
    kind: gguf.GGMLQuantizationType

    @property
    def n_bytes(self) -> int:
        """Size of the stored values."""
        return math.prod(self.values.shape) * (
            4 if self.kind == gguf.GGMLQuantizationType.F32 else 2
        )


def exact_precision(model: Model) -> str:
    """The smallest of ``UNQUANTIZED`` that holds the checkpoint's decoder without rounding."""
    names = [name for name, shape in model.decoder.shapes().items() if len(shape) > 1]
    if not model.tied:
        names.append(model.decoder.head)
    stored = {model.tensors[name].dtype for name in names}
    return stored.pop().lower() if len(stored) == 1 else "f32"


def plan_decoder(model: Model, precision: str) -> list[Output]:
    """The tensors of ``decoder.gguf`` in order; the checkpoint's are read when they are written."""
    kind = gguf.GGMLQuantizationType[precision.upper()]
    # Vectors stay float32: they are small, and llama.cpp expects it.
    return [
        Output(name, values, kind if len(values.shape) > 1 else gguf.GGMLQuantizationType.F32)
        for name, values in _values(model)
    ]


def _values(model: Model) -> Iterator[tuple[str, Values]]:
    decoder, tensors, heads = model.decoder, model.tensors, model.text.attention
    yield "token_embd.weight", decoder.table_values(tensors)
    if not model.tied:
        yield "output.weight", decoder.head_values(tensors)
    yield "output_norm.weight", tensors.values(decoder.norm)
    for index in range(model.text.n_layers):
        for part in decoder.layer(index):
            values = decoder.part(tensors, index, part)
            if decoder.interleaved and part.startswith(("attn_q.", "attn_k.")):
                rotated = heads.n_heads if part.startswith("attn_q.") else heads.n_kv_heads
                values = values.interleaved(rotated)
            yield f"blk.{index}.{part}", values


def write_decoder(
    path: Path,
    model: Model,
    outputs: Sequence[Output],
    *,
    precision: str,
    name: str,
    written: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write the GGUF, one tensor at a time.

    Raises:
        CheckpointError: a tensor cannot be read or does not fit the precision.
    """
    writer = gguf.GGUFWriter(path, model.decoder.architecture)
    try:
        _add_metadata(writer, model, precision, name)
        _add_vocabulary(writer, model)
        for output in outputs:
            writer.add_tensor_info(
                output.name,
                output.values.shape,
                np.dtype(np.float32),
                output.n_bytes,
                raw_dtype=output.kind,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for output in outputs:
            writer.write_tensor_data(_convert(output))
            written(output.n_bytes)
    finally:
        writer.close()


def _add_metadata(writer: gguf.GGUFWriter, model: Model, precision: str, name: str) -> None:
    text = model.text
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    mostly = "ALL_F32" if precision == "f32" else f"MOSTLY_{precision.upper()}"
    writer.add_file_type(gguf.LlamaFileType[mostly])
    writer.add_context_length(text.max_sequence_length)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.n_layers)
    writer.add_feed_forward_length(text.ffn_size)
    writer.add_head_count(text.attention.n_heads)
    writer.add_head_count_kv(text.attention.n_kv_heads)
    writer.add_key_length(text.attention.head_dim)
    writer.add_value_length(text.attention.head_dim)
    writer.add_rope_dimension_count(text.attention.head_dim)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.norm_eps)
    writer.add_vocab_size(text.n_ids)
    if model.decoder.sections:
        writer.add_rope_dimension_sections([*model.decoder.sections, 0])
    for key, value in model.decoder.metadata.items():
        key = f"{model.decoder.architecture}.{key}"
        if isinstance(value, (list, tuple)):
            writer.add_array(key, list(value))
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))


def _add_vocabulary(writer: gguf.GGUFWriter, model: Model) -> None:
    text, tokenizer, stop = model.text, model.tokenizer, model.settings.stop_ids
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(list(tokenizer.tokens))
    if tokenizer.scores:
        writer.add_token_scores(list(tokenizer.scores))
    writer.add_token_types([int(kind) for kind in tokenizer.types])
    if tokenizer.merges:
        writer.add_token_merges(list(tokenizer.merges))
    if tokenizer.bos is not None:
        writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(stop[0])
    writer.add_eot_token_id(stop[-1])
    writer.add_add_bos_token(False)  # edge-vlm puts it in front itself
    if tokenizer.scores:  # and SentencePiece's space, but not inside a text
        writer.add_add_space_prefix(False)
    if text.additional_vocab_size:
        writer.add_array(SUPPRESS_TOKENS, list(range(text.vocab_size, text.n_ids)))
    writer.add_chat_template(model.settings.chat_template)


def _convert(output: Output) -> npt.NDArray[Any]:
    """All values in the stored type; bfloat16 as its 16 bits."""
    values, kind = output.values, output.kind
    if kind == gguf.GGMLQuantizationType.F16:
        return values.read(np.float16, lambda block: to_half(block, output.name))
    if kind == gguf.GGMLQuantizationType.BF16:
        return values.read(np.uint16, lambda block: gguf.quants.quantize(block, kind).view("<u2"))
    return values.read()
