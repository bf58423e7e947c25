"""Pictures that are no files: objects, data: URLs, pipes, and parts of pictures."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import ImageError, PromptError
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.pictures.image import Cropped, Opened, load_image, open_image
from edge_vlm.pictures.sources import each_part, is_pipe, parse_crop, read_pipe
from edge_vlm.prompt.messages import ImagePart, user_message
from tests.picture_files import encoded, photo

PNG = encoded(photo(), "PNG")
PIXELS = np.asarray(photo())
SETTINGS = MachineSettings(cache=None)


def refused(source: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert str(caught.value).isprintable()
    return str(caught.value)


class Array:
    """What torch, cv2 wrappers and camera libraries give."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if isinstance(self.pixels, Exception):
            raise self.pixels
        return self.pixels


class Reader:
    """A stream that cannot go back."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def read(self, n: int = -1) -> Any:
        data, self.data = self.data, b""
        return data


def test_objects_that_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(PNG)
    spooled = tempfile.SpooledTemporaryFile()  # noqa: SIM115
    spooled.write(PNG)  # it stands at its end
    with spooled, path.open("rb") as file, path.open("rb", buffering=0) as raw:
        for source in (io.BytesIO(PNG), file, raw, spooled, Reader(PNG), Reader(bytearray(PNG))):
            assert np.array_equal(load_image(source), PIXELS)
    assert np.array_equal(load_image(Array(PIXELS)), PIXELS)
    assert np.array_equal(load_image(Array(PIXELS[..., 0])), np.repeat(PIXELS[..., :1], 3, 2))


def test_objects_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("text")
    with path.open() as file:
        assert refused(file) == "the image: its read() gives text; open the file with mode 'rb'"
    closed = io.BytesIO(PNG)
    closed.close()
    assert "cannot be read" in refused(closed)
    assert refused(Reader(None)) == "the image: its read() gives NoneType, not bytes"
    assert "is empty" in refused(Reader(b""))
    assert "is text" in refused(io.BytesIO(b"hello"))
    assert refused(Array(RuntimeError("on the GPU"))).endswith("its __array__ failed (on the GPU)")
    assert "(4,)" in refused(Array(np.zeros(4, np.uint8)))


def test_truth_is_white() -> None:
    truth = PIXELS > 100
    assert np.array_equal(load_image(truth), truth * np.uint8(255))
    assert np.array_equal(load_image(truth[..., 0])[..., 2], truth[..., 0] * np.uint8(255))


def test_a_stream_is_read_once_for_a_whole_conversation() -> None:
    (part, _) = user_message([Reader(PNG)], "?").parts
    assert isinstance(part, ImagePart)
    for _ in range(2):
        assert np.array_equal(load_image(part.source), PIXELS)


def test_of_a_long_data_url_the_first_bytes_are_looked_at_first() -> None:
    long = "data:image/png;base64," + "A" * (80 << 20)
    started = time.process_time()
    assert "is not a picture in a format" in refused(long)
    assert time.process_time() - started < 0.5
    html = base64.b64encode(b"<html>" + bytes(2 << 20)).decode()
    assert refused(f"data:image/png;base64,{html}").startswith("the data: URL: is an HTML page")
    tail = base64.b64encode(PNG + bytes(2 << 20)).decode()
    assert np.array_equal(load_image(f"data:image/png;base64,{tail}"), PIXELS)


# Parts


@pytest.mark.parametrize(
    ("crop", "box"),
    [
        ("0,0,160,120", (0, 0, 160, 120)),
        ("10,20,30,40", (10, 20, 30, 40)),
        (" 10 , 20 , 30 , 40 ", (10, 20, 30, 40)),
        ((10, 20, 30, 40), (10, 20, 30, 40)),
        (["10%", 20, "50 %", 40], (16, 20, 80, 40)),
        ("10%,20%,50%,30%", (16, 24, 80, 36)),
        ("12.5%,0,12.5%,1", (20, 0, 20, 1)),
        ("0%,0%,100%,100%", (0, 0, 160, 120)),
        ("99%,99%,0.1%,0.1%", (158, 119, 1, 1)),
    ],
)
def test_a_part_of_a_picture(crop: Any, box: tuple[int, int, int, int]) -> None:
    left, top, width, height = box
    expected = PIXELS[top : top + height, left : left + width]
    for source in (PNG, PIXELS, photo(), Opened(PIXELS)):
        opened = open_image(Cropped(source, crop), SETTINGS)
        assert opened.crop == box
        assert np.array_equal(opened.pixels, expected)


@pytest.mark.parametrize("crop", ["150,0,20,20", "0,100,10,21", "50%,0,51%,10", "160,0,1,1"])
def test_a_part_beyond_the_picture_is_refused_with_its_size(crop: str) -> None:
    with pytest.raises(ImageError, match="reaches beyond the picture, which is 160x120"):
        open_image(Cropped(PNG, crop), SETTINGS)


BAD_CROPS = (
    *("", "1,2,3", "1,2,3,4,5", "a,b,c,d", "-1,0,5,5", "1.5,0,5,5", "0,0,0,5", "0,0,5%,0%"),
    *("1e3,0,1,1", 5, None, (1, 2, 3), "9" * 20 + ",0,1,1"),
)


@pytest.mark.parametrize("crop", BAD_CROPS)
def test_other_words_for_a_part_are_refused(crop: Any) -> None:
    with pytest.raises(PromptError, match=r"crop: "):
        parse_crop(crop)


def test_names_of_several_pages(tmp_path: Path) -> None:
    assert each_part("a.pdf#page=2-4") == [f"a.pdf#page={n}" for n in (2, 3, 4)]
    assert each_part(Path("a.gif#frame=1-2")) == ["a.gif#frame=1", "a.gif#frame=2"]
    for name in ("a.pdf", "a.pdf#page=3", "a#b", "#page=1-2", PNG):
        assert each_part(name) == [name]
    own = tmp_path / "a.pdf#page=1-2"
    own.write_bytes(PNG)
    assert each_part(str(own)) == [str(own)]
    for name in ("a#page=0-2", "a#page=3-2", "a#page=1-65"):
        with pytest.raises(ImageError, match="at most 64 at once"):
            each_part(name)
    assert len(user_message(["a.pdf#page=1-3", "b.png"], "?").parts) == 5


# Pipes


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def test_a_pipe_is_read_to_its_end(fifo: Path) -> None:
    assert is_pipe(str(fifo))
    writer = threading.Thread(target=fifo.write_bytes, args=(PNG * 30,), daemon=True)
    writer.start()
    assert read_pipe(str(fifo)) == PNG * 30
    writer.join(10)
    assert not writer.is_alive()


def test_a_pipe_that_nobody_writes_to_is_given_up(fifo: Path) -> None:
    with pytest.raises(ImageError, match=r"fifo: nothing came for 0\.2 s"):
        read_pipe(str(fifo), seconds=0.2)
    fifo.open("wb").close()  # lets the thread end


def test_a_pipe_that_holds_too_much_is_refused(fifo: Path) -> None:
    def write() -> None:
        with contextlib.suppress(BrokenPipeError):
            fifo.write_bytes(bytes(20 << 20))

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    with pytest.raises(ImageError, match="fifo: holds more than 1 MiB"):
        read_pipe(str(fifo), max_bytes=1 << 20)
    writer.join(10)
    assert not writer.is_alive()


def test_what_is_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    for name in ("missing", str(tmp_path), str(tmp_path / "x"), "a\0b", "x" * 5000, "/dev/zero"):
        assert not is_pipe(name)
