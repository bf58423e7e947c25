"""Frames of a source, each answered by a toy model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_vlm import Cancelled, CancelToken, EdgeVLM, Progress, VisionError
from edge_vlm.answering.watch import watch
from edge_vlm.errors import InputError
from edge_vlm.pictures.frames import Frame, Pause
from tests.answering.test_turns import picture
from tests.fake_engine import FakeEngine

Pixels = npt.NDArray[np.uint8]


@pytest.fixture
def model(fake: FakeEngine) -> Iterator[EdgeVLM]:
    with fake.load() as loaded:
        yield loaded


class Source:
    """Frames, errors, and at last the end of the source."""

    def __init__(self, *frames: Pixels | str) -> None:
        self._frames = frames

    def frames(self, pause: Pause) -> Iterator[Frame]:
        for frame in self._frames:
            pause.wait(0)
            yield Frame("x", error=frame) if isinstance(frame, str) else Frame("x", frame)
        raise InputError("the source has ended")


def watched(model: EdgeVLM, *frames: Pixels | str, **options: Any) -> list[dict[str, Any]]:
    """The lines until the source ends."""
    found: list[dict[str, Any]] = []
    source: Any = Source(*frames)

    def read() -> None:
        for line in watch(model, source, "What?", cancel=CancelToken(), **options):
            found.append(line)

    with pytest.raises(InputError, match="has ended"):
        read()
    return found


def test_each_frame_is_answered_and_tiles_are_shared(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue("Noise.", "More.")
    one, two = picture(1), picture(1)
    two[2:4, 2:4] ^= 0xFF
    first, second = watched(model, one, two)
    assert [first[key] for key in ("frame", "answer", "changed", "encoded_crops")] == [
        *(1, "Noise.", True, 7)
    ]
    assert [second[key] for key in ("frame", "answer", "changed")] == [2, "More.", True]
    assert 0 < second["encoded_crops"] < 7
    assert first["time"] < second["time"]


def test_a_frame_like_the_last_is_not_computed_again(model: EdgeVLM, fake: FakeEngine) -> None:
    fake.enqueue("Noise.")
    one = picture(1)
    found = watched(model, one, one.copy(), "broken", one.copy())
    assert [line.get("answer") for line in found] == ["Noise.", "Noise.", None, "Noise."]
    assert [line.get("changed") for line in found] == [True, False, None, False]
    assert len(fake.decoder.sampled) == 1


def test_a_frame_that_is_no_picture_for_the_model_is_an_error_line(model: EdgeVLM) -> None:
    long = np.zeros((1, 300, 3), np.uint8)
    first, second, third = watched(model, long, picture(1), long, max_tokens=2)
    assert "200 times" in first["error"]
    assert "200 times" in third["error"]
    assert second["frame"] == 2
    assert "error" not in second


def test_stopping_ends_it(model: EdgeVLM) -> None:
    cancel = CancelToken()

    def stop(progress: Progress) -> None:
        if progress.stage == "decode":
            cancel.set()

    source: Any = Source(picture(1), picture(2))
    with pytest.raises(Cancelled):
        next(watch(model, source, "What?", cancel=cancel, progress=stop))


def test_an_engine_that_fails_ends_it(model: EdgeVLM, fake: FakeEngine) -> None:
    source: Any = Source(picture(1), picture(2))
    running = watch(model, source, "What?", cancel=CancelToken(), max_tokens=2)
    next(running)
    fake.fail("vision.encode", VisionError("no memory"))
    with pytest.raises(VisionError):
        next(running)
