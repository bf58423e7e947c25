"""What a request costs in bytes, from sizes alone.

Bytes follow what llama.cpp and onnxruntime allocate; the constants say where each comes from.
"""

from __future__ import annotations

from edge_vlm.families.sizes import Decoder, block_weights
from edge_vlm.machine.engine_settings import KV_TYPES
from edge_vlm.planning.budget import context_size

# Interpreter, numpy, Pillow, pydantic, onnxruntime and llama.cpp before a model is loaded.
PYTHON_BYTES = 90_000_000

# Bytes of vision weights that onnxruntime holds for each in the files: it packs a matrix for its
# kernels and frees the original, but widens half precision to float32 when it opens the graph.
VISION_GROWTH = {"fp16": 2.0}

# onnxruntime's arena beyond what lives at once. It grows during the first run, in which tensors are
# allocated one by one, and again for the second, for which it lays them out in one block. Measured
# with a tower of the released width: 186 MB where 107 MB live (int8: 124 MB).
ARENA_GROWTH = 1.75

# What each further call at the same time adds; measured at full size: 73 MB fp32, 66 MB int8.
ARENA_OF_A_STREAM = 0.65

# Tensor types for which llama.cpp has interleaved ("repacked") kernels, and so keeps a second
# copy of these matrices. Source: ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type.
REPACKED = {
    "x86": frozenset({"q4_0", "q4_K"}),  # with AVX2
    "arm": frozenset({"q4_0", "q4_K", "q5_K", "q6_K", "q8_0"}),  # with dot product or i8mm
}

# Bytes per element of GGUF's tensor types. Source: ggml-common.h.
TENSOR_TYPES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q6_K": 210 / 256,
    "q5_K": 176 / 256,
    "q4_K": 144 / 256,
    "q4_0": 18 / 32,
    "iq4_xs": 136 / 256,
}


def kv_bytes(decoder: Decoder, n_positions: int, kv_type: str) -> int:
    """Bytes of the KV cache llama.cpp allocates for at least ``n_positions``."""
    return context_size(n_positions) * decoder.kv_bytes_per_token(KV_TYPES[kv_type])


def compute_bytes(
    decoder: Decoder, n_context: int, batch_size: int, kv_type: str, flash_attention: bool
) -> int:
    """Bytes of llama.cpp's compute buffer when logits are read for one position.

    Everything is float32, for ``batch_size`` positions at once: the inputs, and either the
    attention scores of all heads or the tensors of the feed-forward part, whichever is larger.
    """
    hidden, query = 4 * decoder.hidden_size, 4 * decoder.n_heads * decoder.head_dim
    mask = (2 if flash_attention else 4) * n_context
    # Where each value of V goes, as int64: V lies transposed unless it is quantized.
    places = 0 if kv_type.startswith("q") else 8 * decoder.n_kv_heads * decoder.head_dim
    inputs = hidden + mask + places
    scores = 0 if flash_attention else 4 * decoder.n_heads * n_context
    attention = scores + 2 * hidden + 2 * query
    # Residual, its norm, gate and up; their product takes the norm's place where it fits there.
    product = decoder.ffn_size if decoder.ffn_size > decoder.hidden_size else 0
    feed_forward = 2 * hidden + 4 * (2 * decoder.ffn_size + product)
    return min(batch_size, n_context) * (inputs + max(attention, feed_forward))


def work_bytes(decoder: Decoder, n_context: int, batch_size: int, flash_attention: bool) -> int:
    """Bytes in which llama.cpp's CPU backend converts the right side of its largest product.

    It is float32 and becomes half precision before a product with half-precision K or V: the
    scores of all heads are larger than any other.
    """
    scores = 0 if flash_attention else decoder.n_heads * n_context
    return 2 * min(batch_size, n_context) * max(scores, decoder.ffn_size)


def arena_bytes(live_bytes: int, tiles_per_call: int = 1, n_calls: int = 1) -> int:
    """Peak bytes of onnxruntime's arena while ``n_calls`` encode ``tiles_per_call`` crops each.

    ``live_bytes`` are what one crop needs at once, see ``VisionWork``.
    """
    growth = ARENA_GROWTH + ARENA_OF_A_STREAM * (n_calls - 1)
    return round(growth * tiles_per_call * live_bytes)


def gguf_bytes(decoder: Decoder, precision: str) -> dict[str, int]:
    """Bytes of the decoder's matrices by tensor type; empty for a precision not known here.

    ``q4_k_m`` and ``q5_k_m`` follow llama.cpp's rule: attn_v and ffn_down of the first and last
    eighth of the blocks and of every third between, and the head, are q6_K.
    Source: llama-quant.cpp, llama_tensor_get_type_impl.
    """
    n_ids = decoder.vocab_size + decoder.additional_vocab_size
    table = n_ids * decoder.hidden_size
    head = 0 if decoder.tied_head else decoder.vocab_size * decoder.hidden_size
    blocks = decoder.n_layers * block_weights(decoder)
    name = precision.lower()
    main = {"q4_k_m": "q4_K", "q5_k_m": "q5_K", "q6_k": "q6_K"}.get(name, name)
    if main not in TENSOR_TYPES:
        return {}
    if name in ("f32", "f16", "bf16", "q8_0"):
        elements = {name: blocks + table + head}
    else:
        sixes = 0
        if name.endswith("_k_m"):
            better = sum(_gets_more_bits(i, decoder.n_layers) for i in range(decoder.n_layers))
            value = decoder.hidden_size * decoder.n_kv_heads * decoder.head_dim
            sixes = better * (value + decoder.hidden_size * decoder.ffn_size)
        elements = {main: blocks - sixes + (table if head else 0)}
        elements["q6_K"] = elements.get("q6_K", 0) + sixes + (head or table)
    return {kind: round(count * TENSOR_TYPES[kind]) for kind, count in elements.items()}


def table_and_head(decoder: Decoder, precision: str) -> tuple[tuple[str, int], tuple[str, int]]:
    """Tensor type and bytes of the token table, and of the head (0 if it is the table).

    Empty types and 0 for a precision not known here.
    """
    kinds = list(gguf_bytes(decoder, precision))
    if not kinds:
        return ("", 0), ("", 0)
    # Where there are two types, the table has the first, and the head, or a table that is the head
    # too, the other.
    table_kind, head_kind = (kinds[-1] if decoder.tied_head else kinds[0]), kinds[-1]
    n_ids = decoder.vocab_size + decoder.additional_vocab_size
    table = round(n_ids * decoder.hidden_size * TENSOR_TYPES[table_kind])
    head = round(decoder.vocab_size * decoder.hidden_size * TENSOR_TYPES[head_kind])
    return (table_kind, table), (head_kind, 0 if decoder.tied_head else head)


def repacked_bytes(decoder: Decoder, precision: str, processor_family: str = "x86") -> int:
    """Bytes of the second copy of matrices that llama.cpp repacks; the token table is not."""
    kinds = REPACKED.get(processor_family, frozenset())
    total = sum(size for kind, size in gguf_bytes(decoder, precision).items() if kind in kinds)
    (table_kind, table), _ = table_and_head(decoder, precision)
    return total - (table if table_kind in kinds else 0)


def _gets_more_bits(layer: int, n_layers: int) -> bool:
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
