"""Decoders of the Llama kind: what a checkpoint calls their tensors, and what llama.cpp does.

RMSNorm, rotary positions, grouped queries and a gated feed-forward part; norms of queries and keys
(Qwen3) and biases of queries, keys and values (Qwen2) where there are any. From one description
follow the tensors that a checkpoint has to have, ``decoder.gguf``, and the reference that a
quantized file is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from edge_vlm.bundle.json_text import wrong
from edge_vlm_export.checkpoint.config_file import Epsilon, Layers, Size, StopIds
from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32, Shape, Values, stacked
from edge_vlm_export.families.rope import RotaryText
from edge_vlm_export.graph.architecture import AttentionSizes


@dataclass(frozen=True)
class TextSettings:
    """The language model's sizes."""

    n_layers: int
    hidden_size: int
    attention: AttentionSizes
    ffn_size: int
    norm_eps: float
    rope_theta: float
    max_sequence_length: int
    vocab_size: int  # ids that an answer may have
    additional_vocab_size: int  # ids behind them that are only read

    @property
    def n_ids(self) -> int:
        """Rows of the token table: the vocabulary and the ids that can only be read."""
        return self.vocab_size + self.additional_vocab_size


class DecoderText(RotaryText):
    """The keys that transformers' configurations of these decoders have in common."""

    model_type: str
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 24)] = 32768
    rms_norm_eps: Epsilon = 1e-6
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: bool | None = None
    eos_token_id: StopIds | None = None

    @property
    def attention(self) -> AttentionSizes:
        """Heads; as many for keys and values as for queries where nothing is said."""
        n_heads = self.num_attention_heads
        return AttentionSizes(
            n_heads=n_heads,
            n_kv_heads=self.num_key_value_heads or n_heads,
            head_dim=self.head_dim or self.hidden_size // n_heads,
        )

    @property
    def context_length(self) -> int:
        """Most positions of a context."""
        return self.max_position_embeddings

    def settings(self, n_spoken: int | None = None) -> TextSettings:
        """Its sizes; ids from ``n_spoken`` on are only read."""
        spoken = self.vocab_size if n_spoken is None else n_spoken
        return TextSettings(
            n_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            attention=self.attention,
            ffn_size=self.intermediate_size,
            norm_eps=self.rms_norm_eps,
            rope_theta=self.theta,
            max_sequence_length=self.context_length,
            vocab_size=spoken,
            additional_vocab_size=self.vocab_size - spoken,
        )

    @model_validator(mode="after")
    def _heads_agree(self) -> DecoderText:
        n_heads, sizes = self.num_attention_heads, self.attention
        if self.head_dim is None and self.hidden_size % n_heads:
            raise wrong("num_attention_heads", n_heads, "which does not divide hidden_size")
        if n_heads % sizes.n_kv_heads:
            raise wrong("num_key_value_heads", sizes.n_kv_heads, f"which does not divide {n_heads}")
        if sizes.head_dim % 2:
            raise wrong("head_dim", sizes.head_dim, "rotary positions need an even number")
        return self


@dataclass(frozen=True)
class Rows:
    """Where a matrix begins in a stored tensor that may hold several.

    With ``block``, it has the first so many of every ``step`` rows from there on.
    """

    tensor: str
    start: int = 0
    block: int = 0
    step: int = 0

    def spans(self, n_rows: int) -> Iterator[tuple[int, int]]:
        """First and end of each run of rows of a matrix that has ``n_rows``."""
        if not self.block:
            yield self.start, self.start + n_rows
            return
        for index in range(n_rows // self.block):
            first = self.start + index * self.step
            yield first, first + self.block


Layer = Callable[[int], Mapping[str, Rows]]


@dataclass(frozen=True)
class LlamaLike:
    """One decoder. Parts of a block go by llama.cpp's names, such as ``attn_q.weight``.

    ``layer`` gives those of a block by its index, in the order of the file. The head is the token
    table where a checkpoint has no tensor for it.
    """

    architecture: str  # of the GGUF, which settles what llama.cpp computes
    text: TextSettings
    table: Mapping[str, int]  # tensors of the token table and their rows
    norm: str  # in front of the head
    head: str
    head_rows: int
    layer: Layer
    interleaved: bool = False  # llama.cpp rotates neighbours: architecture "llama"
    # M-RoPE: frequencies of a head that turn by time, row and column; none without it.
    sections: tuple[int, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)  # more keys of the GGUF

    @property
    def part_shapes(self) -> dict[str, Shape]:
        """Of every part that a block can have."""
        hidden, heads, ffn = self.text.hidden_size, self.text.attention, self.text.ffn_size
        q, kv = heads.q_size, heads.kv_size
        return {
            "attn_norm.weight": (hidden,),
            "attn_q.weight": (q, hidden),
            "attn_k.weight": (kv, hidden),
            "attn_v.weight": (kv, hidden),
            "attn_q.bias": (q,),
            "attn_k.bias": (kv,),
            "attn_v.bias": (kv,),
            "attn_q_norm.weight": (heads.head_dim,),
            "attn_k_norm.weight": (heads.head_dim,),
            "attn_output.weight": (hidden, q),
            "ffn_norm.weight": (hidden,),
            "ffn_up.weight": (ffn, hidden),
            "ffn_gate.weight": (ffn, hidden),
            "ffn_down.weight": (hidden, ffn),
        }

    def shapes(self) -> dict[str, Shape]:
        """The tensors of a checkpoint, the output head aside."""
        hidden = self.text.hidden_size
        shapes: dict[str, Shape] = {name: (rows, hidden) for name, rows in self.table.items()}
        shapes[self.norm] = (hidden,)
        parts = self.part_shapes
        for index in range(self.text.n_layers):
            for part, rows in self.layer(index).items():
                end = max(stop for _, stop in rows.spans(parts[part][0]))
                before = shapes.get(rows.tensor, (0,))[0]
                shapes[rows.tensor] = (max(before, end), *parts[part][1:])
        return shapes

    @property
    def head_shape(self) -> Shape:
        """Of the output head, where it is not tied."""
        return self.head_rows, self.text.hidden_size

    def part(self, tensors: Checkpoint, index: int, part: str) -> Values:
        """A part of a block as the checkpoint has it."""
        rows, n_rows = self.layer(index)[part], self.part_shapes[part][0]
        return stacked(*(tensors.values(rows.tensor, *span) for span in rows.spans(n_rows)))

    def table_values(self, tensors: Checkpoint) -> Values:
        """The token table (n_ids, hidden_size)."""
        return stacked(*map(tensors.values, self.table))

    def head_values(self, tensors: Checkpoint) -> Values:
        """The head with a row for each id; those that are only read repeat the last one's."""
        head = tensors.values(self.head)
        missing = self.text.n_ids - self.head_rows

        def repeated() -> Iterator[Float32]:
            row = tensors[self.head].rows(self.head_rows - 1, self.head_rows)
            yield np.repeat(row, missing, axis=0)

        if not missing:
            return head
        return stacked(head, Values((missing, self.text.hidden_size), repeated))

    def rows(self, tensors: Checkpoint, ids: Sequence[int]) -> Values:
        """Rows of the token table: (len(ids), hidden_size)."""

        def row(token: int) -> Values:
            for name, n_rows in self.table.items():
                if token < n_rows:
                    return tensors.values(name, token, token + 1)
                token -= n_rows
            raise IndexError(token)

        return stacked(*map(row, ids))


def usual_layer(prefix: str, *, biases: bool = False, qk_norms: bool = False) -> Layer:
    """The names that Llama, Mistral, Qwen2 and Qwen3 have; ``prefix`` ends with "layers."."""
    parts = {"attn_norm.weight": "input_layernorm.weight"}
    for part in "qkv":
        parts[f"attn_{part}.weight"] = f"self_attn.{part}_proj.weight"
        if biases:
            parts[f"attn_{part}.bias"] = f"self_attn.{part}_proj.bias"
    if qk_norms:
        parts |= {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}
    parts |= {
        "attn_output.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn_up.weight": "mlp.up_proj.weight",
        "ffn_gate.weight": "mlp.gate_proj.weight",
        "ffn_down.weight": "mlp.down_proj.weight",
    }
    return lambda index: {part: Rows(f"{prefix}{index}.{name}") for part, name in parts.items()}
