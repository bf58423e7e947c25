"""jina-vlm's language model: Qwen3, for llama.cpp's ``qwen3``.

Two orders cannot be seen from a shape: ``qkv_w`` holds Q, K and V rows in this order, and ``up``
holds [up; gate], to be combined as ``down(silu(gate) * up)``.

The token table has the rows of the vocabulary and of the additional ids, which stand for parts of a
picture: they can be read, never generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edge_vlm_export.families.llama_like import LlamaLike, Rows, TextSettings

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tensors import Shape

TEXT = "model.language_model."
EMBEDDING = f"{TEXT}embedding.embedding"
NEW_EMBEDDING = f"{TEXT}embedding.new_embedding"
HEAD = "lm_head.weight"
_BIASES = ("q_b", "k_b", "v_b")  # stored by the published code, and zero


def decoder(text: TextSettings) -> LlamaLike:
    """The language model."""
    heads = text.attention

    def layer(index: int) -> Mapping[str, Rows]:
        prefix = f"{TEXT}layers.{index}."
        qkv, up = f"{prefix}attn.qkv_w.weight", f"{prefix}ffn.up.weight"
        return {
            "attn_norm.weight": Rows(f"{prefix}attn_lnorm.weight"),
            "attn_q.weight": Rows(qkv),
            "attn_k.weight": Rows(qkv, heads.q_size),
            "attn_v.weight": Rows(qkv, heads.q_size + heads.kv_size),
            "attn_q_norm.weight": Rows(f"{prefix}attn.q_lnorm.weight"),
            "attn_k_norm.weight": Rows(f"{prefix}attn.k_lnorm.weight"),
            "attn_output.weight": Rows(f"{prefix}attn.out.weight"),
            "ffn_norm.weight": Rows(f"{prefix}ffn_lnorm.weight"),
            "ffn_up.weight": Rows(up),
            "ffn_gate.weight": Rows(up, text.ffn_size),
            "ffn_down.weight": Rows(f"{prefix}ffn.down.weight"),
        }

    return LlamaLike(
        architecture="qwen3",
        text=text,
        table={EMBEDDING: text.vocab_size, NEW_EMBEDDING: text.additional_vocab_size},
        norm=f"{TEXT}ln_f.weight",
        head=HEAD,
        head_rows=text.vocab_size,
        layer=layer,
    )


def text_bias_shapes(text: TextSettings) -> dict[str, Shape]:
    """The attention biases, which may be stored but have to be zero."""
    heads = text.attention
    sizes = dict(zip(_BIASES, (heads.q_size, heads.kv_size, heads.kv_size), strict=True))
    return {
        f"{TEXT}layers.{layer}.attn.{name}": (size,)
        for layer in range(text.n_layers)
        for name, size in sizes.items()
    }
