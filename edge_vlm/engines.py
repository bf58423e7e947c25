"""What answering needs of its two engines.

``pictures.tower`` and ``decoder.decoder`` are those that run bundles; a test or an app may give
``EdgeVLM`` its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_vlm.progress import CancelToken

    Float32 = npt.NDArray[np.float32]
    Int32 = npt.NDArray[np.int32]


class VisionTower(Protocol):
    """Crops to embeddings."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What an embedding depends on besides the crop; keys of caches are made of it."""

    @property
    def output_shape(self) -> tuple[int, int]:
        """Of one crop's embeddings: (tokens_per_crop, hidden_size)."""

    @property
    def n_markers(self) -> int:
        """Rows of ``marker_embeddings``."""

    @property
    def marker_embeddings(self) -> Float32:
        """(n_markers, hidden_size): rows of the decoder's input that no crop decides."""

    @property
    def is_loaded(self) -> bool:
        """Whether it is in memory."""

    @property
    def load_seconds(self) -> float:
        """Spent on loading until now."""

    def encode_parts(
        self,
        feed: Mapping[str, npt.NDArray[Any]],
        wanted: Sequence[int] | None = None,
        *,
        cancel: CancelToken | None = None,
    ) -> Iterator[tuple[list[int], Float32]]:
        """Indices and embeddings (n, tokens_per_crop, hidden_size) of the ``wanted`` crops.

        Args:
            feed: inputs of the graph, see ``families.base.Tiles``.
            wanted: indices; all by default.
            cancel: stops it with ``Cancelled``.
        """

    def load(self) -> Any:
        """Load now what encoding needs."""

    def rest(self) -> None:
        """Give back what only encoding needed."""

    def release(self) -> None:
        """Give all memory back until the next picture."""


class Context(Protocol):
    """One sequence in a KV cache, counted in cells: one a token or row of a picture.

    Which positions the model gives them is the context's to know: the next ones, or with M-RoPE
    those of a picture, so that a prompt may have more cells than positions.
    """

    @property
    def n_positions(self) -> int:
        """Cells in use."""

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for the KV cache."""

    def reserve(self, n_positions: int) -> None:
        """Make room for ``n_positions`` cells in all; what is cached stays."""

    def truncate(self, n_positions: int) -> None:
        """Forget all but the first ``n_positions`` cells; a picture of M-RoPE goes as a whole."""

    def settle(self) -> None:
        """Do now what the first token of an answer would have to wait for."""

    def append_tokens(
        self,
        ids: Sequence[int],
        *,
        logits: bool = False,
        cancel: CancelToken | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Prefill token ids; ``logits`` computes them for the last position."""

    def append_embeddings(
        self,
        rows: Float32,
        *,
        positions: Int32 | None = None,
        logits: bool = False,
        cancel: CancelToken | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Prefill rows of shape (n, hidden_size).

        ``positions`` are given for a picture of a family that has M-RoPE, see ``Family.positions``.
        """

    def logits(self) -> Float32:
        """(n_ids,): scores of the token that follows, a copy."""

    def forbid(self, ids: npt.NDArray[np.bool_]) -> None:
        """Give those of the ids (n_ids,) that are set a logit of minus infinity."""

    def state(self, n_positions: int | None = None) -> npt.NDArray[np.uint8]:
        """The first cells of what is cached, as bytes for ``set_state``."""

    @property
    def state_bytes(self) -> int:
        """Size of what ``state`` gives."""

    def set_state(self, state: npt.NDArray[np.uint8]) -> bool:
        """Replace what is cached; false, and nothing cached, if it does not fit."""

    def close(self) -> None:
        """Free the KV cache."""


class Sampler(Protocol):
    """Picks the next token."""

    def sample(self, context: Any) -> int:
        """By the logits of the context's last position."""


class Decoder(Protocol):
    """Token ids and embeddings to logits."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a KV cache depends on besides its input; keys of caches are made of it."""

    @property
    def n_ids(self) -> int:
        """Size of the token table, the ids that are only read included."""

    @property
    def chat_template(self) -> str:
        """Text of the chat template."""

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""

    @property
    def load_seconds(self) -> float:
        """Spent on what was loaded after the vocabulary, until now."""

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text: special tokens are neither recognised nor added."""

    def piece(self, token: int) -> bytes:
        """Bytes that a token stands for; none for special tokens."""

    def pieces(self) -> Sequence[bytes]:
        """``piece`` of all ids in order; none for ids that are only read."""

    def context(self, n_positions: int) -> Context:
        """A context with room for at least ``n_positions`` cells."""

    def sampler(
        self, *, temperature: float, top_p: float, min_p: float, seed: int
    ) -> AbstractContextManager[Sampler]:
        """Temperature 0 takes the likeliest token; ids that are only read never win."""

    def working(self) -> AbstractContextManager[None]:
        """``release`` does nothing meanwhile."""

    def release(self) -> None:
        """Give the weights' memory back until a context needs them; contexts keep their content."""

    def close(self) -> None:
        """Free everything, or leave that to the last context that is still open."""
