"""The decoder's KV cache up to the end of a picture, kept on disk.

A prompt is prefilled in batches that end where a picture ends, whether or not anything is cached,
and only what was computed that way from the first position on is kept. So a restored prefix is,
byte for byte, the one that would be computed, and so is what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge_vlm.engines import Context
from edge_vlm.machine.store import Entry, Store, make_key
from edge_vlm.prompt.positions import picture_ends

_KIND = "prefix"


class PrefixCache:
    """Prefixes of prompts, each ending with a picture.

    Prompts are given as in ``positions``: ids, one an input position, where -1 - i stands for
    picture i, whose content is ``digests[i]``.

    Args:
        store: where they are kept.
        identity: what a KV cache depends on besides the prompt, see ``Decoder.identity``.
    """

    def __init__(self, store: Store, identity: Mapping[str, Any]) -> None:
        self._store = store
        self._identity = dict(identity)

    def restore(self, context: Context, ids: Sequence[int], digests: Sequence[bytes]) -> int:
        """Fill an empty context with the longest prefix that is kept; returns its positions."""
        for end in reversed(picture_ends(ids)):
            if end == len(ids):
                continue  # the logits of the last position are not kept
            key = self._key(ids[:end], digests)
            state = self._store.read(_KIND, key)
            if state is None:
                continue
            if context.set_state(state) and context.n_positions == end:
                return end
            self._store.drop(_KIND, key)
            context.truncate(0)
        return 0

    def keep(self, context: Context, ids: Sequence[int], digests: Sequence[bytes]) -> None:
        """Keep the context's first positions, which are those of the prompt ``ids``."""
        state = context.state(len(ids))
        self._store.write_soon([Entry(_KIND, self._key(ids, digests), state)])

    def _key(self, ids: Sequence[int], digests: Sequence[bytes]) -> bytes:
        used = sorted({-1 - value for value in ids if value < 0})
        return make_key(
            self._identity,
            np.array(ids, np.int32).tobytes(),
            *(digests[index] for index in used),
        )
