"""What became of an answer's pictures, and that what is kept of one is not taken for another."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_vlm import EdgeVLM, ImageError, PromptError
from tests.fake_engine import FakeEngine
from tests.picture_files import encoded

PAPER = np.full((40, 52, 4), (0, 0, 0, 0), np.uint8)
PAPER[10:30, 20:25] = (0, 0, 0, 255)
HIDDEN = encoded(Image.fromarray(PAPER), "PNG")
WHITE = np.where(PAPER[..., 3:] == 255, 0, 255).astype(np.uint8).repeat(3, axis=2)


def ask(vlm: EdgeVLM, fake: FakeEngine, image: Any, **how: Any) -> Any:
    fake.decoder.enqueue("yes")
    (use,) = vlm.ask(image, "?", **how).images
    return use


def test_it_is_said_what_hidden_pixels_became(fake: FakeEngine) -> None:
    for alpha in ("white", "drop"):
        with fake.load(alpha=alpha) as vlm:
            assert ask(vlm, fake, HIDDEN).alpha == alpha
            assert ask(vlm, fake, WHITE).alpha is None


def test_hidden_pixels_change_what_is_looked_up(fake: FakeEngine, tmp_path: Path) -> None:
    """White and dropped have keys of their own; white has that of the same picture on paper."""
    digests = {}
    for name, source, alpha in (
        ("white", HIDDEN, "white"),
        ("drop", HIDDEN, "drop"),
        ("paper", WHITE, "white"),
        ("black", np.zeros_like(WHITE), "white"),
    ):
        with fake.load(alpha=alpha, cache=tmp_path) as vlm:
            digests[name] = vlm.encode(source).digest
    assert digests["white"] == digests["paper"] != digests["drop"] == digests["black"]


def test_a_part_is_the_picture_of_that_part(fake: FakeEngine) -> None:
    part = WHITE[10:30, 5:45]
    with fake.load() as vlm:
        use = ask(vlm, fake, WHITE, crop="5,10,40,20")
        assert (use.size, use.crop) == ((40, 20), (5, 10, 40, 20))
        assert vlm.encode(WHITE, crop=(5, 10, 40, 20)).digest == vlm.encode(part).digest
        message = {"role": "user", "content": [{"type": "image", "image": WHITE}]}
        fake.decoder.enqueue("yes", "yes")
        (use,) = vlm.ask(messages=[message], crop="50%,0%,50%,100%").images
        assert use.crop == (26, 0, 26, 40)
        with vlm.chat() as chat:
            assert chat.ask(WHITE, "?", crop="0,0,20,20").images[0].size == (20, 20)


def test_a_part_that_is_not_there(fake: FakeEngine) -> None:
    with fake.load() as vlm:
        with pytest.raises(ImageError, match="which is 52x40"):
            vlm.ask(WHITE, "?", crop="40,0,20,20")
        with pytest.raises(PromptError, match="crop: must be X,Y,W,H"):
            vlm.ask(WHITE, "?", crop="left")


def test_a_stream_and_a_frame_are_pictures(fake: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "film"
    Image.fromarray(WHITE).save(
        path, "GIF", save_all=True, append_images=[Image.new("RGB", (52, 40), "red")]
    )
    with fake.load() as vlm, io.BytesIO(HIDDEN) as stream:
        assert ask(vlm, fake, stream).size == (52, 40)
        fake.decoder.enqueue("yes")
        assert len(vlm.ask([f"{path}#frame=1-2"], "?").images) == 2


def test_little_of_a_large_picture_is_seen(fake: FakeEngine) -> None:
    with fake.load() as vlm:
        assert ask(vlm, fake, np.zeros((400, 520, 3), np.uint8)).loses_detail
        assert not ask(vlm, fake, WHITE).loses_detail
        assert ask(vlm, fake, np.zeros((70, 90, 3), np.uint8), max_tiles=1).loses_detail
