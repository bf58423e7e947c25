"""``decoder.gguf``: the language model for llama.cpp's ``qwen3``, tokenizer and template included.

The token table has the rows of the vocabulary and of the additional ids, which stand for parts of a
picture: they can be read, never generated. llama.cpp wants an output head of the same number of
rows and its qwen3 graph has no output bias to switch rows off, so three things together keep the
additional ids out of an answer: an untied head repeats the row of the last vocabulary id for them
(greedy choice takes the first of equals), ``tokenizer.ggml.suppress_tokens`` names them for
programs that honour it, and edge-vlm's own sampling masks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32
from edge_vlm_export.checkpoint.tokenizer import Tokenizer
from edge_vlm_export.families.jina_vlm.config import Settings
from edge_vlm_export.families.jina_vlm.layout import EMBEDDING, HEAD, NEW_EMBEDDING, TEXT
from edge_vlm_export.graph.onnx_graph import to_half

UNQUANTIZED = ("f32", "f16", "bf16")
SUPPRESS_TOKENS = "tokenizer.ggml.suppress_tokens"  # llama.cpp since 2026; ignored before

_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
}

Blocks = Callable[[], Iterator[Float32]]


@dataclass(frozen=True)
class Output:
    """One tensor of the GGUF; ``blocks`` yields its rows in order, in pieces of bounded size."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    blocks: Blocks

    @property
    def n_bytes(self) -> int:
        """Size of the stored values."""
        return math.prod(self.shape) * (4 if self.kind == gguf.GGMLQuantizationType.F32 else 2)


def exact_precision(checkpoint: Checkpoint) -> str:
    """The smallest of ``UNQUANTIZED`` that holds the checkpoint's decoder without rounding."""
    stored = {
        tensor.dtype
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) > 1 and (name == HEAD or name.startswith(TEXT))
    }
    return stored.pop().lower() if len(stored) == 1 else "f32"


def plan_decoder(
    checkpoint: Checkpoint, settings: Settings, *, tied: bool, precision: str
) -> list[Output]:
    """The tensors of ``decoder.gguf`` in order; the checkpoint's are read when they are written."""
    return list(_Planner(checkpoint, settings, _TYPES[precision]).outputs(tied))


def write_decoder(
    path: Path,
    outputs: Sequence[Output],
    settings: Settings,
    tokenizer: Tokenizer,
    *,
    precision: str,
    name: str,
    written: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write the GGUF, one tensor at a time.

    Raises:
        CheckpointError: a tensor cannot be read or does not fit the precision.
    """
    writer = gguf.GGUFWriter(path, "qwen3")
    try:
        _add_metadata(writer, settings, tokenizer, precision, name)
        for output in outputs:
            writer.add_tensor_info(
                output.name,
                output.shape,
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


def _add_metadata(
    writer: gguf.GGUFWriter, settings: Settings, tokenizer: Tokenizer, precision: str, name: str
) -> None:
    text = settings.text
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[precision])
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

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(tokenizer.tokens))
    writer.add_token_types([int(kind) for kind in tokenizer.types])
    writer.add_token_merges(list(tokenizer.merges))
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(settings.stop_ids[0])
    writer.add_eot_token_id(settings.stop_ids[-1])
    writer.add_add_bos_token(False)
    writer.add_array(SUPPRESS_TOKENS, list(range(text.vocab_size, text.n_ids)))
    writer.add_chat_template(settings.chat_template)


class _Planner:
    def __init__(
        self, checkpoint: Checkpoint, settings: Settings, kind: gguf.GGMLQuantizationType
    ) -> None:
        self.checkpoint = checkpoint
        self.text = settings.text
        self.kind = kind

    def outputs(self, tied: bool) -> Iterator[Output]:
        text, heads = self.text, self.text.attention
        yield self._output("token_embd.weight", (text.n_ids, text.hidden_size), self._table)
        if not tied:
            yield self._output("output.weight", (text.n_ids, text.hidden_size), self._head)
        yield self._whole("output_norm.weight", f"{TEXT}ln_f.weight")
        q_end, k_end = heads.q_size, heads.q_size + heads.kv_size
        v_end = k_end + heads.kv_size
        ffn = text.ffn_size
        for layer in range(text.n_layers):
            source, target = f"{TEXT}layers.{layer}.", f"blk.{layer}."
            qkv, up = f"{source}attn.qkv_w.weight", f"{source}ffn.up.weight"
            yield self._whole(f"{target}attn_norm.weight", f"{source}attn_lnorm.weight")
            yield self._part(f"{target}attn_q.weight", qkv, 0, q_end)
            yield self._part(f"{target}attn_k.weight", qkv, q_end, k_end)
            yield self._part(f"{target}attn_v.weight", qkv, k_end, v_end)
            yield self._whole(f"{target}attn_q_norm.weight", f"{source}attn.q_lnorm.weight")
            yield self._whole(f"{target}attn_k_norm.weight", f"{source}attn.k_lnorm.weight")
            yield self._whole(f"{target}attn_output.weight", f"{source}attn.out.weight")
            yield self._whole(f"{target}ffn_norm.weight", f"{source}ffn_lnorm.weight")
            yield self._part(f"{target}ffn_up.weight", up, 0, ffn)
            yield self._part(f"{target}ffn_gate.weight", up, ffn, 2 * ffn)
            yield self._whole(f"{target}ffn_down.weight", f"{source}ffn.down.weight")

    def _table(self) -> Iterator[Float32]:
        for name in (EMBEDDING, NEW_EMBEDDING):
            yield from self._rows(name)

    def _head(self) -> Iterator[Float32]:
        yield from self._rows(HEAD)
        last = self.text.vocab_size - 1
        row = self.checkpoint[HEAD].rows(last, last + 1)
        yield np.repeat(row, self.text.additional_vocab_size, axis=0)

    def _whole(self, name: str, source: str) -> Output:
        return self._output(name, self.checkpoint[source].shape, lambda: self._rows(source))

    def _part(self, name: str, source: str, start: int, stop: int) -> Output:
        tensor = self.checkpoint[source]
        shape = (stop - start, *tensor.shape[1:])
        return self._output(name, shape, lambda: iter([tensor.rows(start, stop)]))

    def _rows(self, source: str) -> Iterator[Float32]:
        return (block for _, block in self.checkpoint[source].blocks())

    def _output(self, name: str, shape: tuple[int, ...], blocks: Blocks) -> Output:
        """Norm weights stay float32: they are small, and llama.cpp expects it."""
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else self.kind
        return Output(name, shape, kind, blocks)


def _convert(output: Output) -> npt.NDArray[Any]:
    """All values in the stored type; bfloat16 as its 16 bits."""
    stored = {
        gguf.GGMLQuantizationType.F32: np.float32,
        gguf.GGMLQuantizationType.F16: np.float16,
        gguf.GGMLQuantizationType.BF16: np.uint16,
    }[output.kind]
    out: npt.NDArray[Any] = np.empty(output.shape, stored)
    start = 0
    for block in output.blocks():
        if output.kind == gguf.GGMLQuantizationType.F16:
            values: npt.NDArray[Any] = to_half(block, output.name)
        elif output.kind == gguf.GGMLQuantizationType.BF16:
            values = gguf.quants.quantize(block, output.kind).view(np.uint16)
        else:
            values = block
        out[start : start + len(block)] = values
        start += len(block)
    assert start == output.shape[0]  # noqa: S101
    return out
