"""A picture in a conversation: opened, encoded once, and what stands for it afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from edge_vlm import Cancelled, CancelToken, DecoderError, EdgeVLM, ImageError, Progress
from edge_vlm.families.jina_vlm.tiling import cut_tiles, stitch
from edge_vlm.pictures.picture import Picture, encode_pictures, open_picture, seen_among
from tests.fake_engine import FakeEngine
from tests.toy import tower as toy
from tests.toy.sizes import PROCESSOR

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


@pytest.fixture
def model(fake: FakeEngine) -> EdgeVLM:
    return fake.load()


def opened(model: EdgeVLM, source: object = PIXELS, max_tiles: int = 6) -> Picture:
    limited = PROCESSOR.model_copy(update={"max_crops": max_tiles})
    return open_picture(source, limited, 1, model.engine)


def test_a_picture_is_planned_when_it_is_opened(model: EdgeVLM) -> None:
    picture = opened(model)
    plan = cut_tiles(PIXELS, PROCESSOR).plan
    assert picture.use.size == (80, 60)
    assert picture.use.resized == plan.resized_hw[::-1]
    assert (picture.use.tiling, picture.use.crops) == (plan.tiling, plan.n_crops)
    assert picture.use.reduced
    assert picture.n_tokens == plan.n_tokens
    assert picture.rows is None
    with pytest.raises(DecoderError, match="was not encoded"):
        picture.encoded(b"")


def test_its_rows_are_those_of_its_crops(model: EdgeVLM) -> None:
    picture = opened(model)
    crops = encode_pictures([picture], model.engine.tiles, lambda _: None, None)
    tiles = cut_tiles(PIXELS, PROCESSOR)
    expected = stitch(toy.embed(tiles.crops, tiles.is_last), toy.MARKERS, tiles.plan, PROCESSOR)
    assert picture.rows is not None
    assert np.array_equal(picture.rows, expected)
    assert picture.pixels is None  # not needed any more
    assert (crops.encoded, crops.cached) == (7, 0)
    again = encode_pictures([picture], model.engine.tiles, lambda _: None, None)
    assert (again.encoded, again.cached) == (0, 0)


def test_a_digest_is_of_pixels_and_tiling(model: EdgeVLM) -> None:
    other = PIXELS.copy()
    other[-1, -1, -1] ^= 1
    digests = [
        opened(model).digest,
        opened(model, other).digest,
        opened(model, max_tiles=2).digest,
        opened(model, PIXELS.reshape(80, 60, 3)).digest,
    ]
    assert len(set(digests)) == len(digests)
    assert opened(model, PIXELS.copy()).digest == digests[0]


def test_several_are_encoded_with_one_count(model: EdgeVLM) -> None:
    pictures = [opened(model), opened(model, PIXELS[:20, :20]), opened(model)]
    seen: list[Progress] = []
    crops = encode_pictures(pictures, model.engine.tiles, seen.append, None)
    total = sum(picture.use.crops for picture in pictures)
    assert (crops.encoded, crops.cached) == (total - 7, 7)
    assert {progress.total for progress in seen} == {total}
    done = [progress.done for progress in seen]
    assert (done[0], done[-1], done) == (0, total, sorted(done))


def test_what_was_encoded_stands_for_the_picture(model: EdgeVLM) -> None:
    picture = opened(model, max_tiles=2)
    encode_pictures([picture], model.engine.tiles, lambda _: None, None)
    handle = picture.encoded(model.engine.tiles.model)
    assert handle.n_tokens == picture.n_tokens
    again = opened(model, handle)  # six tiles would be allowed now
    assert again.rows is picture.rows
    assert (again.use, again.digest) == (picture.use, picture.digest)
    assert seen_among(again, 3, model.engine) is again  # this family sees each for itself
    with pytest.raises(ImageError, match="another model"):
        opened(model, picture.encoded(b"another"))


def test_a_picture_that_was_stopped_is_encoded_later(model: EdgeVLM, fake: FakeEngine) -> None:
    pictures, cancel = [opened(model), opened(model, PIXELS[::-1])], CancelToken()

    def stop(progress: Progress) -> None:
        if progress.done == 9:
            cancel.set()

    with pytest.raises(Cancelled):
        encode_pictures(pictures, model.engine.tiles, stop, cancel)
    assert [picture.rows is None for picture in pictures] == [False, True]
    encode_pictures(pictures, model.engine.tiles, lambda _: None, None)
    assert pictures[1].rows is not None
    assert fake.journal.n("vision.encode") == 14


@pytest.mark.parametrize("source", [b"no picture", "missing.png", np.zeros((1, 201, 3), np.uint8)])
def test_what_is_no_picture(model: EdgeVLM, source: object) -> None:
    with pytest.raises(ImageError):
        opened(model, source)


def test_the_callers_array_may_change_after_the_question(model: EdgeVLM, fake: FakeEngine) -> None:
    pixels = PIXELS.copy()
    before = model.ask(pixels, "What?", max_tokens=8).token_ids
    pixels[:] = 0
    after = model.ask(pixels, "What?", max_tokens=8).token_ids
    assert model.ask(PIXELS, "What?", max_tokens=8).token_ids == before != after
