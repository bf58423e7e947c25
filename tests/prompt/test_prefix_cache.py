"""KV caches up to the end of a picture, kept on disk: found again, and never taken for another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_vlm.machine.store import Store
from edge_vlm.prompt.builder import PrefixCache
from tests.fake_engine import FakeContext, FakeDecoder
from tests.toy.sizes import HIDDEN

ROWS = np.random.default_rng(0).normal(size=(2, 5, HIDDEN)).astype(np.float32)
DIGESTS = [b"first picture", b"second picture"]
# A word, the first picture, two words, the second picture, a word.
IDS = (7, *[-1] * 5, 8, 9, *[-2] * 5, 10)
ENDS = (6, 13)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "pictures", 1 << 20)


@pytest.fixture
def prefixes(store: Store) -> PrefixCache:
    return PrefixCache(store, {"decoder": "fake"})


def filled(decoder: FakeDecoder, n_positions: int = len(IDS)) -> FakeContext:
    """A context that holds so much of the prompt."""
    context = decoder.context(n_positions)
    for position, value in enumerate(IDS[:n_positions]):
        if value >= 0:
            context.append_tokens([value], logits=True)
        else:
            first = IDS.index(value)
            context.append_embeddings(ROWS[-1 - value][[position - first]])
    return context


def keep(prefixes: PrefixCache, store: Store, end: int) -> None:
    prefixes.keep(filled(FakeDecoder()), IDS[:end], DIGESTS)
    store.flush()


@pytest.mark.parametrize("end", ENDS)
def test_what_is_restored_is_what_was_there(prefixes: PrefixCache, store: Store, end: int) -> None:
    keep(prefixes, store, end)
    context = FakeDecoder().context(len(IDS))
    assert prefixes.restore(context, IDS, DIGESTS) == end == context.n_positions
    expected = filled(FakeDecoder(), end)
    for made in (context, expected):
        made.append_tokens([10], logits=True)
    assert np.array_equal(context.logits(), expected.logits())


def test_the_longest_is_restored(prefixes: PrefixCache, store: Store) -> None:
    for end in ENDS:
        keep(prefixes, store, end)
    assert prefixes.restore(FakeDecoder().context(20), IDS, DIGESTS) == ENDS[1]
    shorter = (*IDS[: ENDS[0]], 8, *[-2] * 5, 10)  # another text between the two
    assert prefixes.restore(FakeDecoder().context(20), shorter, DIGESTS) == ENDS[0]


def test_a_prompt_that_ends_with_a_picture_is_computed(prefixes: PrefixCache, store: Store) -> None:
    """The logits of its last position are not kept."""
    keep(prefixes, store, ENDS[0])
    context = FakeDecoder().context(20)
    assert prefixes.restore(context, IDS[: ENDS[0]], DIGESTS) == 0
    assert context.n_positions == 0


@pytest.mark.parametrize(
    ("ids", "digests"),
    [
        ((6, *IDS[1:]), DIGESTS),  # another word in front
        ((7, *[-1] * 4, *IDS[6:]), DIGESTS),  # another size
        (IDS, DIGESTS[::-1]),  # another picture
        (tuple(-3 - value if value < 0 else value for value in IDS), DIGESTS),  # swapped
    ],
)
def test_nothing_else_finds_it(
    prefixes: PrefixCache, store: Store, ids: tuple[int, ...], digests: list[bytes]
) -> None:
    for end in ENDS:
        keep(prefixes, store, end)
    assert prefixes.restore(FakeDecoder().context(20), ids, digests) == 0


def test_a_picture_that_is_not_in_the_prefix_does_not_matter(
    prefixes: PrefixCache, store: Store
) -> None:
    keep(prefixes, store, ENDS[0])
    assert prefixes.restore(FakeDecoder().context(20), IDS, [DIGESTS[0], b"a third"]) == ENDS[0]


def test_another_decoder_finds_nothing(prefixes: PrefixCache, store: Store) -> None:
    keep(prefixes, store, ENDS[0])
    other = PrefixCache(store, {"decoder": "another"})
    assert other.restore(FakeDecoder().context(20), IDS, DIGESTS) == 0


@pytest.mark.parametrize("damage", ["refused", "shorter"])
def test_what_does_not_fit_goes(prefixes: PrefixCache, store: Store, damage: str) -> None:
    """As of a build that writes it otherwise: checksums are right, the content is not."""

    class Odd(FakeContext):
        def state(self, n_positions: int | None = None) -> np.ndarray:
            found = super().state(n_positions)
            return found[1:] if damage == "refused" else found[:-8]

    decoder = FakeDecoder()
    odd = Odd(decoder, 20)
    for value in range(ENDS[0]):
        odd.append_tokens([value])
    prefixes.keep(odd, IDS[: ENDS[0]], DIGESTS)
    store.flush()
    context = decoder.context(20)
    assert prefixes.restore(context, IDS, DIGESTS) == 0
    assert context.n_positions == 0
    assert store.info().entries["prefix"] == 0
    keep(prefixes, store, ENDS[0])
    assert prefixes.restore(context, IDS, DIGESTS) == ENDS[0]
