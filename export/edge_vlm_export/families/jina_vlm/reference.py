"""The unquantized decoder in float32, layer by layer, straight from the checkpoint.

It is what a quantized decoder is compared with, and what an importance matrix is collected from. An
engine that maps a whole file of the real size would hold more than four gigabytes; here all prompts
go through one layer before the next one is read, so memory stays at the size of a layer. Read from
the checkpoint and not from a GGUF, it also notices a tensor that was written to the wrong place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edge_vlm_export.checkpoint.tensors import Checkpoint, Float32
from edge_vlm_export.families.jina_vlm.config import Settings
from edge_vlm_export.families.jina_vlm.layout import EMBEDDING, HEAD, NEW_EMBEDDING, TEXT

# Called with the GGUF's name of a weight and the vectors it is multiplied with, (n, columns).
OnMatmul = Callable[[str, Float32], None]


class Reference:
    """Qwen3 as the checkpoint stores it."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self._checkpoint = checkpoint
        self._text = settings.text
        self._head = HEAD if HEAD in checkpoint else EMBEDDING

    @property
    def head_name(self) -> str:
        """The GGUF's name of the output head."""
        return "output.weight" if self._head == HEAD else "token_embd.weight"

    def embed(self, ids: Sequence[int]) -> Float32:
        """(len(ids), hidden_size): rows of the token table."""
        vocabulary = self._text.vocab_size
        rows = {}
        for token in set(ids):
            name, row = (
                (EMBEDDING, token) if token < vocabulary else (NEW_EMBEDDING, token - vocabulary)
            )
            rows[token] = self._checkpoint[name].rows(row, row + 1)[0]
        return np.stack([rows[token] for token in ids])

    def run(
        self,
        inputs: Sequence[Float32],
        wanted: Sequence[npt.NDArray[np.bool_]],
        on_matmul: OnMatmul | None = None,
        progress: Callable[[int], None] = lambda n_layers: None,
    ) -> list[Float32]:
        """Hidden states of the wanted positions behind the final norm: what the head gets.

        As in llama.cpp, the other positions go no further than the last layer's attention.

        Args:
            inputs: decoder inputs, (n_positions, hidden_size) for each prompt.
            wanted: (n_positions,) for each prompt.
            on_matmul: called for every weight matrix of the blocks and each prompt.
            progress: called with the layers done.
        """
        states = [np.array(rows, np.float32) for rows in inputs]
        for layer in range(self._text.n_layers):
            block = _Block(self, layer, on_matmul or _ignore)
            last = layer + 1 == self._text.n_layers
            for index, rows in enumerate(states):
                states[index] = block(rows, wanted[index] if last else None)
            progress(layer + 1)
        norm = self._read("ln_f.weight")
        return [self.normed(rows, norm) for rows in states]

    def logits(self, hidden: Float32) -> Float32:
        """(n, vocab_size) for hidden states of shape (n, hidden_size)."""
        out = np.empty((len(hidden), self._text.vocab_size), np.float32)
        for start, rows in self._checkpoint[self._head].blocks():
            np.matmul(hidden, rows.T, out=out[:, start : start + len(rows)])
        return out

    def normed(self, rows: Float32, weight: Float32) -> Float32:
        """RMSNorm over the last axis."""
        scale = np.mean(np.square(rows), axis=-1, keepdims=True) + np.float32(self._text.norm_eps)
        normed: Float32 = rows / np.sqrt(scale) * weight
        return normed

    def _read(self, name: str) -> Float32:
        return self._checkpoint[f"{TEXT}{name}"].read()


class _Block:
    """One layer with its weights in memory."""

    def __init__(self, reference: Reference, layer: int, on_matmul: OnMatmul) -> None:
        self._reference, self._on_matmul = reference, on_matmul
        self._text, self._target = reference._text, f"blk.{layer}."
        prefix = f"layers.{layer}."
        self._weights = {
            name: reference._read(f"{prefix}{name}.weight")
            for name in (
                "attn_lnorm",
                "attn.qkv_w",
                "attn.q_lnorm",
                "attn.k_lnorm",
                "attn.out",
                "ffn_lnorm",
                "ffn.up",
                "ffn.down",
            )
        }

    def __call__(self, rows: Float32, kept: npt.NDArray[np.bool_] | None) -> Float32:
        weights, norm = self._weights, self._reference.normed
        rows = rows + self._attention(norm(rows, weights["attn_lnorm"]))
        if kept is not None:
            rows = rows[kept]
        normed = norm(rows, weights["ffn_lnorm"])
        up, gate = np.split(self._project("ffn.up", normed, "ffn_up", "ffn_gate"), 2, axis=-1)
        up *= gate / (1 + np.exp(-gate))
        return rows + self._project("ffn.down", up, "ffn_down")

    def _attention(self, rows: Float32) -> Float32:
        heads, n = self._text.attention, len(rows)
        qkv = self._project("attn.qkv_w", rows, "attn_q", "attn_k", "attn_v")
        qkv = qkv.reshape(n, -1, heads.head_dim).transpose(1, 0, 2)
        cuts = [heads.n_heads, heads.n_heads + heads.n_kv_heads]
        queries, keys, values = np.split(qkv, cuts)
        norm, weights = self._reference.normed, self._weights
        queries = _rotate(norm(queries, weights["attn.q_lnorm"]), self._text.rope_theta)
        keys = _rotate(norm(keys, weights["attn.k_lnorm"]), self._text.rope_theta)
        future = np.triu(np.ones((n, n), bool), 1)
        mixed = np.empty_like(queries)
        per_key = heads.n_heads // heads.n_kv_heads
        for head in range(heads.n_heads):
            scores = queries[head] @ keys[head // per_key].T / np.sqrt(np.float32(heads.head_dim))
            scores[future] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            mixed[head] = scores @ values[head // per_key]
        return self._project("attn.out", mixed.transpose(1, 0, 2).reshape(n, -1), "attn_output")

    def _project(self, weight: str, rows: Float32, *targets: str) -> Float32:
        for target in targets:
            self._on_matmul(f"{self._target}{target}.weight", rows)
        projected: Float32 = rows @ self._weights[weight].T
        return projected


def _rotate(heads: Float32, theta: float) -> Float32:
    """Rotary positions 0, 1, 2, ... on (n_heads, n, head_dim), halves paired."""
    half = heads.shape[-1] // 2
    frequencies = theta ** -(np.arange(half, dtype=np.float64) / half)
    angles = np.arange(heads.shape[1])[:, None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = heads[..., :half], heads[..., half:]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _ignore(_name: str, _rows: npt.NDArray[np.float32]) -> None:
    pass
