"""Embeddings of tiles by content: what is encoded, what is known, and what that depends on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_vlm import Cancelled, CancelToken, VisionError
from edge_vlm.families.jina_vlm.tiling import JinaTiles, cut_tiles
from edge_vlm.machine.store import Entry, Store
from edge_vlm.pictures.picture import TileCache
from tests.fake_engine import FakeTower
from tests.toy import tower as toy
from tests.toy.sizes import HIDDEN, PROCESSOR

CROP_BYTES = PROCESSOR.tokens_per_crop * HIDDEN * 4
Pixels = npt.NDArray[np.uint8]


class Cache(TileCache):
    """With its tower."""

    def __init__(
        self,
        store: Store | None = None,
        memory: int = 1 << 20,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.tower = FakeTower()
        super().__init__(self.tower, identity or self.tower.identity, memory, store)

    @property
    def n_encoded(self) -> int:
        """Crops so far."""
        return self.tower.journal.n("vision.encode")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "pictures", 1 << 20)


def noise(seed: int = 0, height: int = 60, width: int = 80) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def cut(pixels: Pixels) -> JinaTiles:
    return cut_tiles(pixels, PROCESSOR)


def expected(tiles: JinaTiles) -> npt.NDArray[np.float32]:
    return toy.embed(tiles.crops, tiles.is_last)


def test_a_picture_is_encoded_once() -> None:
    cache, tiles = Cache(), cut(noise())
    for n_known in (0, 7):
        found, known = cache.encode(tiles)
        assert np.array_equal(found, expected(tiles))
        assert (known, cache.n_encoded) == (n_known, 7)


def test_only_crops_that_differ_are_encoded() -> None:
    cache, before = Cache(), noise()
    cache.encode(cut(before))
    after = before.copy()
    after[2:6, 2:6] ^= 0xFF
    tiles = cut(after)
    n_changed = int((tiles.crops != cut(before).crops).any(axis=(1, 2)).sum())
    assert 2 <= n_changed <= 4  # the thumbnail, and those that overlap there
    found, known = cache.encode(tiles)
    assert np.array_equal(found, expected(tiles))
    assert known == 7 - n_changed


def test_equal_crops_of_one_picture_are_encoded_once() -> None:
    """But the last, to which its place gives another embedding."""
    cache, tiles = Cache(), cut(np.full((60, 80, 3), 128, np.uint8))
    found, known = cache.encode(tiles)
    assert np.array_equal(found, expected(tiles))
    assert (known, cache.n_encoded) == (5, 2)
    assert not np.array_equal(found[-1], found[0])


def test_memory_is_bounded_and_the_longest_unused_goes() -> None:
    cache = Cache(memory=14 * CROP_BYTES)
    first, second, third = (cut(noise(seed)) for seed in range(3))
    for tiles in (first, second, first, third):
        cache.encode(tiles)
    assert cache.n_encoded == 21
    assert cache.encode(first)[1] == 7
    assert cache.encode(second)[1] == 0
    nothing = Cache(memory=0)
    nothing.encode(first)
    assert nothing.encode(first)[1] == 0


def test_another_process_finds_them_on_disk(store: Store) -> None:
    first, tiles = Cache(store), cut(noise())
    first.encode(tiles)
    markers = first.markers()
    store.flush()
    other = Cache(Store(store.folder, 1 << 20))
    found, known = other.encode(tiles)
    assert np.array_equal(found, expected(tiles))
    assert np.array_equal(other.markers(), markers)
    assert (known, other.tower.is_loaded) == (7, False)  # the tower was not needed
    assert np.array_equal(markers, toy.MARKERS)


def test_a_damaged_entry_is_encoded_again(store: Store) -> None:
    tiles = cut(noise())
    Cache(store).encode(tiles)
    store.flush()
    path = next((store.folder / "entries").iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found, known = Cache(store).encode(tiles)
    assert np.array_equal(found, expected(tiles))
    assert known == 6


def test_another_tower_finds_nothing(store: Store) -> None:
    tiles = cut(noise())
    ours = Cache(store)
    ours.encode(tiles)
    ours.markers()
    store.flush()
    other = Cache(store, identity={"vision": "another"})
    assert other.encode(tiles)[1] == 0
    other.markers()
    assert other.tower.journal.n("vision.load") == 1
    assert other.model != ours.model
    assert Cache().model == ours.model


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_what_was_encoded_before_the_end_is_kept(store: Store, how: str) -> None:
    cache, tiles, cancel = Cache(store, memory=0), cut(noise()), CancelToken()

    def stop(n_crops: int) -> None:
        if n_crops == 3:
            if how == "failed":
                cache.tower.journal.fail("vision.encode", VisionError("no memory"))
            else:
                cancel.set()

    with pytest.raises(VisionError if how == "failed" else Cancelled):
        cache.encode(tiles, cancel=cancel, progress=stop)
    store.flush()
    found, known = Cache(store).encode(tiles)
    assert np.array_equal(found, expected(tiles))
    assert known == 3


def test_progress_counts_what_is_known_first() -> None:
    cache, before = Cache(), noise()
    done: list[int] = []
    cache.encode(cut(before), progress=done.append)
    assert done == list(range(1, 8))
    done.clear()
    cache.encode(cut(before), progress=done.append)
    assert done == list(range(1, 8))


def test_rows_that_are_kept_hold_no_others_alive() -> None:
    cache, tiles = Cache(), cut(noise())
    cache.encode(tiles)
    tiles.crops[:] = 0  # what was given is the caller's to change
    found, known = cache.encode(cut(noise()))
    assert known == 7
    found[:] = 0  # and so is what was returned
    assert np.array_equal(cache.encode(cut(noise()))[0], expected(cut(noise())))


@pytest.mark.parametrize("size", [0, 1, 7, CROP_BYTES - 4, CROP_BYTES + 4, 2 * CROP_BYTES])
def test_an_entry_of_another_size_is_computed_again(store: Store, size: int) -> None:
    """Its checksums are right: somebody else has written it. The markers' too."""
    tiles = cut(noise())
    first = Cache(store)
    wanted, markers = first.encode(tiles)[0], first.markers()
    store.flush()
    for path in list((store.folder / "entries").iterdir()):
        path.unlink()
        store.write_soon([Entry("tile", bytes.fromhex(path.stem), np.zeros(size, np.uint8))])
    store.flush()
    for n_encoded in (first.n_encoded, 0):
        again = Cache(store)
        np.testing.assert_array_equal(again.encode(tiles)[0], wanted)
        np.testing.assert_array_equal(again.markers(), markers)
        assert again.n_encoded == n_encoded
        store.flush()
