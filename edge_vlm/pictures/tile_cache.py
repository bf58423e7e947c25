"""Embeddings of tiles by content, in memory and on disk.

A tile's embeddings depend on its own pixels alone (and on what else a family's graph asks of it,
see ``Tiles.extras``), so a tile that was seen before, in whatever picture, frame or tiling, is not
encoded again. They are kept as the float32 that the vision tower gives: rounded to 16 bit, an
answer would differ from the one computed without the cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.engines import VisionTower
from edge_vlm.families.base import Tiles
from edge_vlm.machine.store import Entry, Store, make_key
from edge_vlm.progress import CancelToken

Float32 = npt.NDArray[np.float32]
_KIND = "tile"


class TileCache:
    """Encodes pictures with a vision tower, each different tile once.

    Args:
        vision: the tower.
        identity: what the embeddings depend on besides the tile, see ``VisionTower.identity``.
        memory_bytes: of embeddings to hold in memory.
        store: where they are kept on disk; None for memory alone.
    """

    def __init__(
        self,
        vision: VisionTower,
        identity: Mapping[str, Any],
        memory_bytes: int,
        store: Store | None = None,
    ) -> None:
        self._vision = vision
        self._identity = dict(identity)
        self._memory_bytes = memory_bytes
        self._store = store
        self._held: OrderedDict[bytes, Float32] = OrderedDict()  # the longest unused first
        self._guard = threading.Lock()

    @property
    def model(self) -> bytes:
        """Stands for the tower: embeddings of two towers that differ do not go together."""
        return make_key(self._identity)

    def encode(
        self,
        tiles: Tiles,
        *,
        cancel: CancelToken | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Float32, int]:
        """Embeddings as of ``VisionTower.encode``, and how many crops were not encoded for it.

        Raises:
            Cancelled: ``cancel`` was set; the crops done are kept.
            VisionError, BundleError: as ``VisionTower.encode``.
        """
        out = np.empty((len(tiles.crops), *self._vision.output_shape), np.float32)
        extras = tiles.extras.values()
        keys = [
            make_key(self._identity, crop.data.cast("B"), *(v[i].tobytes() for v in extras))
            for i, crop in enumerate(tiles.crops)
        ]
        unique = {key: index for index, key in reversed(list(enumerate(keys)))}  # the first of each
        wanted: list[int] = []
        for key, index in sorted(unique.items(), key=lambda item: item[1]):
            known = self._find(key, out.shape[1:])
            if known is None:
                wanted.append(index)
            else:
                out[index] = known
        fresh: list[Entry] = []
        n_known = len(keys) - len(wanted)
        report = progress or (lambda _: None)
        for done in range(n_known):
            report(done + 1)
        try:
            ready = self._vision.encode_parts(tiles.feed, wanted, cancel=cancel)
            for part, rows in ready:
                for index, row in zip(part, rows, strict=True):
                    out[index] = row
                    kept = row.copy()  # not a view that would keep the others alive
                    fresh.append(Entry(_KIND, keys[index], kept))
                    self._hold(keys[index], kept)
                report(n_known + len(fresh))
        finally:
            if self._store:
                self._store.write_soon(fresh)
        for index, key in enumerate(keys):
            if unique[key] != index:
                out[index] = out[unique[key]]
        return out, len(tiles.crops) - len(fresh)

    def markers(self) -> Float32:
        """As ``VisionTower.marker_embeddings``, which need not load the tower."""
        key = make_key(self._identity, b"markers")
        rows = self._find(key, (self._vision.n_markers, self._vision.output_shape[1]))
        if rows is None:
            rows = self._vision.marker_embeddings
            self._hold(key, rows)
            if self._store:
                self._store.write_soon([Entry(_KIND, key, rows)])
        return rows

    def _find(self, key: bytes, shape: tuple[int, ...]) -> Float32 | None:
        with self._guard:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        if self._store is None:
            return None
        payload = self._store.read(_KIND, key)
        if payload is None:
            return None
        rows = payload.view(np.float32).reshape(shape)
        self._hold(key, rows)
        return rows

    def _hold(self, key: bytes, rows: Float32) -> None:
        with self._guard:
            self._held[key] = rows
            self._held.move_to_end(key)
            while sum(held.nbytes for held in self._held.values()) > self._memory_bytes:
                self._held.popitem(last=False)
