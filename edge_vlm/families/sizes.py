"""Sizes of a model's two halves as a manifest states them, and what follows from sizes alone.

A FLOP is a multiplication or an addition, so a matrix product costs two for each weight and
position. Norms, activations and position encodings are left out: together they are under 1 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from edge_vlm.families.parts import Count, Part, Printable, TokenId

if TYPE_CHECKING:
    from typing_extensions import Self


class Vision(Part):
    """The vision tower and connector in ``vision.onnx``.

    ``n_heads``, ``ffn_size``, ``feature_size`` (values of a patch that the connector sees) and
    ``projector_size`` serve the planner alone; early bundles lack them.
    """

    precision: Printable = Field(min_length=1, max_length=40)
    n_layers: Count
    hidden_size: Count
    output_size: Count
    n_heads: Count | None = None
    ffn_size: Count | None = None
    feature_size: Count | None = None
    projector_size: Count | None = None


class Decoder(Part):
    """The language model in ``decoder.gguf``."""

    precision: Printable = Field(min_length=1, max_length=40)
    n_layers: Count
    hidden_size: Count
    ffn_size: Count
    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    vocab_size: TokenId
    additional_vocab_size: TokenId
    max_sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    tied_head: bool

    def kv_bytes_per_token(self, bytes_per_element: float = 2.0) -> int:
        """Bytes one position takes in the KV cache: K and V of every layer."""
        elements = 2 * self.n_layers * self.n_kv_heads * self.head_dim
        return math.ceil(elements * bytes_per_element)


@dataclass(frozen=True)
class VisionWork:
    """What one crop costs in the vision graph."""

    n_weights: int  # elements of all matrices
    tower_flops: int
    connector_flops: int
    live_bytes: int  # of float32 tensors that are needed at once

    @property
    def flops(self) -> int:
        """Of both parts."""
        return self.tower_flops + self.connector_flops


@dataclass(frozen=True)
class Transformer:
    """A vision transformer whose blocks have a plain feed-forward part."""

    n_layers: int
    hidden_size: int
    ffn_size: int
    n_heads: int

    @classmethod
    def of(cls, vision: Vision, **others: int) -> Self:
        """A manifest's; what an early one lacks has the proportions of SigLIP-So400M."""
        hidden = vision.hidden_size
        return cls(
            n_layers=vision.n_layers,
            hidden_size=hidden,
            ffn_size=vision.ffn_size or round(hidden * 4304 / 1152),
            n_heads=vision.n_heads or max(1, hidden // 72),
            **others,
        )

    @property
    def block_weights(self) -> int:
        """Elements of one block's matrices."""
        return self.hidden_size * (4 * self.hidden_size + 2 * self.ffn_size)

    def n_weights(self, n_patches: int, patch_values: int) -> int:
        """Elements of all blocks and of the patch and position embeddings."""
        return self.n_layers * self.block_weights + self.hidden_size * (patch_values + n_patches)

    def flops(self, n_patches: int, patch_values: int) -> int:
        """FLOPs for one crop, attention included."""
        n = n_patches
        block = 2 * n * self.block_weights + 4 * n * n * self.hidden_size
        return 2 * n * patch_values * self.hidden_size + self.n_layers * block

    def live_bytes(self, n_patches: int) -> int:
        """Bytes of what lives at once while a block is computed in float32."""
        scores = 4 * n_patches**2 * self.n_heads  # of all heads, before and after the softmax
        feed_forward = 4 * n_patches * self.ffn_size  # before and after the activation
        hidden = 4 * n_patches * self.hidden_size  # residual, its norm, what a connector reads
        return 2 * scores + 2 * feed_forward + 4 * hidden


def block_weights(decoder: Decoder) -> int:
    """Elements of one decoder block's matrices."""
    attention = 2 * decoder.head_dim * (decoder.n_heads + decoder.n_kv_heads)
    return decoder.hidden_size * (attention + 3 * decoder.ffn_size)


def decoder_flops(decoder: Decoder, n_tokens: int, n_cached: int = 0) -> int:
    """FLOPs of ``n_tokens`` new positions behind ``n_cached`` ones, logits of the last included."""
    # Position i attends to itself and everything before it.
    pairs = n_tokens * n_cached + n_tokens * (n_tokens + 1) // 2
    attention = 4 * pairs * decoder.n_heads * decoder.head_dim
    head = 2 * decoder.hidden_size * decoder.vocab_size
    return 2 * n_tokens * decoder.n_layers * block_weights(decoder) + (
        decoder.n_layers * attention + head
    )
