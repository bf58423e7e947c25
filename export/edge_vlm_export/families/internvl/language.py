"""The language models: Qwen2, and InternLM2 under its own names and those of Llama.

InternLM2 keeps queries, keys and values of a layer in one tensor: for every key head its query
heads, then its key, then its value (modeling_internlm2.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edge_vlm_export.families.llama_like import Layer, LlamaLike, Rows, usual_layer

if TYPE_CHECKING:
    from edge_vlm_export.families.internvl.settings import InternSettings
    from edge_vlm_export.graph.architecture import AttentionSizes

TEXT = "language_model."
# llama.cpp has InternLM2 too, which computes the same as Llama.
_ARCHITECTURES = {"qwen2": "qwen2", "internlm2": "llama", "llama": "llama"}
_INTERNLM2 = {
    "attn_output.weight": "attention.wo",
    "ffn_norm.weight": "ffn_norm",
    "ffn_up.weight": "feed_forward.w3",
    "ffn_gate.weight": "feed_forward.w1",
    "ffn_down.weight": "feed_forward.w2",
}


def decoder(settings: InternSettings) -> LlamaLike:
    """The language model."""
    text, kind = settings.text, settings.config.text_config
    table, head = ("embed_tokens", "lm_head")
    if kind.model_type == "internlm2":
        table, head = ("tok_embeddings", "output")
        layer = internlm2_layer(f"{TEXT}layers.", text.attention)
    else:
        layer = usual_layer(f"{TEXT}layers.", biases=kind.has_biases)
    architecture = _ARCHITECTURES[kind.model_type]
    return LlamaLike(
        architecture=architecture,
        text=text,
        table={f"{TEXT}{table}.weight": text.n_ids},
        norm=f"{TEXT}norm.weight",
        head=f"{TEXT}{head}.weight",
        head_rows=text.n_ids,
        layer=layer,
        interleaved=architecture == "llama",
    )


def internlm2_layer(prefix: str, heads: AttentionSizes) -> Layer:
    """The names and places of InternLM2; ``prefix`` ends with "layers."."""
    n_queries, size = heads.n_heads // heads.n_kv_heads, heads.head_dim
    step = (n_queries + 2) * size

    def layer(index: int) -> Mapping[str, Rows]:
        start = f"{prefix}{index}."
        wqkv = f"{start}attention.wqkv.weight"
        return {
            "attn_norm.weight": Rows(f"{start}attention_norm.weight"),
            "attn_q.weight": Rows(wqkv, 0, n_queries * size, step),
            "attn_k.weight": Rows(wqkv, n_queries * size, size, step),
            "attn_v.weight": Rows(wqkv, (n_queries + 1) * size, size, step),
            **{part: Rows(f"{start}{name}.weight") for part, name in _INTERNLM2.items()},
        }

    return layer
