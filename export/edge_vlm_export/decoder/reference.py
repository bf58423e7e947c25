"""The unquantized decoder in float32, layer by layer, straight from the checkpoint.

It is what a quantized decoder is compared with, and what an importance matrix is collected from:
how strongly each column of each weight is used. An
engine that maps a whole file of the real size would hold more than four gigabytes; here all prompts
go through one layer before the next one is read, so memory stays at the size of a layer. Read from
the checkpoint and not from a GGUF, it also notices what was written wrong there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_vlm_export.checkpoint.tensors import Float32

if TYPE_CHECKING:
    from edge_vlm_export.families.opened import Model
    from edge_vlm_export.samples.conversations import Prompt

Int32 = npt.NDArray[np.int32]
# Called with the GGUF's name of a weight and the vectors it is multiplied with, (n, columns).
OnMatmul = Callable[[str, Float32], None]
_FLOOR = 1e-6  # of the mean: a column that was never used still has to be stored somehow
_QKV = ("attn_q", "attn_k", "attn_v")
_UP_GATE = ("ffn_up", "ffn_gate")


class Reference:
    """A decoder of the Llama kind as the checkpoint stores it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._text = model.text

    def embed(self, ids: Sequence[int]) -> Float32:
        """(len(ids), hidden_size): rows of the token table."""
        different, places = np.unique(ids, return_inverse=True)
        rows = self._model.decoder.rows(self._model.tensors, different.tolist()).read()
        return np.asarray(rows[places])

    def inputs(self, prompt: Prompt) -> Float32:
        """(n, hidden_size): what the first layer gets."""
        out = np.empty((len(prompt.ids), self._text.hidden_size), np.float32)
        text = prompt.ids >= 0
        out[text] = self.embed(prompt.ids[text].tolist())
        out[~text] = prompt.rows
        return out

    def run(
        self,
        inputs: Sequence[Float32],
        wanted: Sequence[npt.NDArray[np.bool_]],
        on_matmul: OnMatmul = lambda name, rows: None,
        progress: Callable[[int], None] = lambda n_layers: None,
        positions: Sequence[Int32 | None] | None = None,
    ) -> list[Float32]:
        """Hidden states of the wanted positions behind the final norm: what the head gets.

        As in llama.cpp, the other positions go no further than the last layer's attention.

        Args:
            inputs: decoder inputs, (n_positions, hidden_size) for each prompt.
            wanted: (n_positions,) for each prompt.
            on_matmul: called for every weight matrix of the blocks and each prompt.
            progress: called with the layers done.
            positions: (n_positions, 3) for each prompt with M-RoPE; else they are counted.
        """
        states = [np.array(rows, np.float32) for rows in inputs]
        angles = [
            self._angles(len(rows), None if positions is None else positions[index])
            for index, rows in enumerate(inputs)
        ]
        for layer in range(self._text.n_layers):
            block = _Block(self, layer, on_matmul)
            last = layer + 1 == self._text.n_layers
            for index, rows in enumerate(states):
                states[index] = block(rows, angles[index], wanted[index] if last else None)
            progress(layer + 1)
        norm = self._model.tensors[self._model.decoder.norm].read()
        return [self.normed(rows, norm) for rows in states]

    def importance(
        self, prompts: Sequence[Prompt], progress: Callable[[int], None] = lambda n_layers: None
    ) -> dict[str, Float32]:
        """Mean squares of what each weight is multiplied with, (columns,) by the GGUF's names.

        llama.cpp's quantizer weighs the error of a column by them. Prompts have pictures, whose
        vectors make up most positions and are unlike those of text. The last layer's feed-forward
        part and the head count the positions that text follows: the runtime computes them for no
        others.
        """
        sums: dict[str, npt.NDArray[np.float64]] = {}
        counts: Counter[str] = Counter()

        def add(name: str, rows: Float32) -> None:
            squares = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
            sums[name] = sums.get(name, 0) + squares
            counts[name] += len(rows)

        inputs = [self.inputs(prompt) for prompt in prompts]
        wanted = [prompt.targets >= 0 for prompt in prompts]
        hidden = self.run(inputs, wanted, add, progress, [p.positions for p in prompts])
        for rows in hidden:
            add("token_embd.weight" if self._model.tied else "output.weight", rows)
        means = {name: total / counts[name] for name, total in sums.items()}
        return {n: (mean + _FLOOR * mean.mean()).astype(np.float32) for n, mean in means.items()}

    def logits(self, hidden: Float32) -> Float32:
        """(n, vocab_size) for hidden states of shape (n, hidden_size)."""
        decoder, tensors = self._model.decoder, self._model.tensors
        head = decoder.table_values(tensors) if self._model.tied else tensors.values(decoder.head)
        out = np.empty((len(hidden), head.shape[0]), np.float32)
        start = 0
        for rows in head.blocks():
            np.matmul(hidden, rows.T, out=out[:, start : start + len(rows)])
            start += len(rows)
        return out[:, : self._text.vocab_size]

    def _angles(self, n: int, positions: Int32 | None) -> npt.NDArray[np.float64]:
        """(n, head_dim / 2): what each position turns each frequency's pair by."""
        half = self._text.attention.head_dim // 2
        frequencies = self._text.rope_theta ** -(np.arange(half, dtype=np.float64) / half)
        if positions is None:
            return np.arange(n)[:, None] * frequencies
        sections = self._model.decoder.sections
        return positions[:, np.repeat((0, 1, 2), sections)] * frequencies

    def normed(self, rows: Float32, weight: Float32) -> Float32:
        """RMSNorm over the last axis."""
        scale = np.mean(np.square(rows), axis=-1, keepdims=True) + np.float32(self._text.norm_eps)
        normed: Float32 = rows / np.sqrt(scale) * weight
        return normed


class _Block:
    """One layer with its weights in memory."""

    def __init__(self, reference: Reference, layer: int, on_matmul: OnMatmul) -> None:
        self._reference, self._on_matmul = reference, on_matmul
        self._text, self._target = reference._text, f"blk.{layer}."
        decoder, tensors = reference._model.decoder, reference._model.tensors
        self._weights = {  # by llama.cpp's names
            part: decoder.part(tensors, layer, part).read() for part in decoder.layer(layer)
        }
        # What reads the same vectors is one product.
        self._matrices: dict[tuple[str, ...], Float32] = {
            names: self._take(names, ".weight")
            for names in (_QKV, ("attn_output",), _UP_GATE, ("ffn_down",))
        }
        self._biases = {names: self._take(names, ".bias") for names in self._matrices}

    def __call__(
        self, rows: Float32, angles: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_] | None
    ) -> Float32:
        rows = rows + self._attention(self._norm("attn_norm", rows), angles)
        if kept is not None:
            rows = rows[kept]
        normed = self._norm("ffn_norm", rows)
        up, gate = np.split(self._project(normed, *_UP_GATE), 2, axis=-1)
        up *= gate / (1 + np.exp(-gate))
        return rows + self._project(up, "ffn_down")

    def _attention(self, rows: Float32, angles: npt.NDArray[np.float64]) -> Float32:
        heads, n = self._text.attention, len(rows)
        qkv = self._project(rows, *_QKV).reshape(n, -1, heads.head_dim).transpose(1, 0, 2)
        queries, keys, values = np.split(qkv, [heads.n_heads, heads.n_heads + heads.n_kv_heads])
        queries = _rotate(self._norm("attn_q_norm", queries), angles)
        keys = _rotate(self._norm("attn_k_norm", keys), angles)
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
        return self._project(mixed.transpose(1, 0, 2).reshape(n, -1), "attn_output")

    def _norm(self, name: str, rows: Float32) -> Float32:
        """A norm; the rows as they are where the model has none of that name."""
        weight = self._weights.get(f"{name}.weight")
        return rows if weight is None else self._reference.normed(rows, weight)

    def _project(self, rows: Float32, *names: str) -> Float32:
        for name in names:
            self._on_matmul(f"{self._target}{name}.weight", rows)
        projected: Float32 = rows @ self._matrices[names].T
        bias = self._biases[names]
        return projected + bias if len(bias) else projected

    def _take(self, names: tuple[str, ...], ending: str) -> Float32:
        """Weights or biases of several products, one after the other; empty if there are none."""
        found = [
            self._weights.pop(name + ending) for name in names if name + ending in self._weights
        ]
        return np.concatenate(found) if found else np.empty(0, np.float32)


def _rotate(heads: Float32, angles: npt.NDArray[np.float64]) -> Float32:
    """Rotary positions (n, head_dim / 2) on (n_heads, n, head_dim), halves paired."""
    half = heads.shape[-1] // 2
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = heads[..., :half], heads[..., half:]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
