"""Frames from folders, commands and cameras: each answered once, as if nothing were reused."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_vlm import Cancelled, CancelToken, EdgeVLM, InputError, MachineSettings
from edge_vlm.answering.watch import changed, watch
from edge_vlm.families.jina_vlm.tiling import cut_tiles
from edge_vlm.pictures.frames import (
    SETTLE_SECONDS,
    Camera,
    Command,
    Folder,
    Frame,
    Pause,
    Source,
)
from tests.conftest import COMMAND, Run, assert_one_line
from tests.fake_engine import FakeEngine

MODEL = "tiny-126-tied"
SETTINGS = MachineSettings(threads=1, cache=None)
Pixels = npt.NDArray[np.uint8]


def picture(seed: int = 0, height: int = 90, width: int = 120) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def printing(path: Path) -> str:
    """A command that writes a file to stdout."""
    code = f"import sys; sys.stdout.buffer.write(open({str(path)!r}, 'rb').read())"
    return f'"{sys.executable}" -c "{code}"'


class Frames:
    """A source of given frames."""

    def __init__(self, *frames: Pixels | str) -> None:
        self._frames = frames

    def frames(self, pause: Pause) -> Iterator[Frame]:
        for frame in self._frames:
            pause.wait(0)
            yield Frame("x", error=frame) if isinstance(frame, str) else Frame("x", frame)


@pytest.fixture(scope="module")
def vlm(bundle: Callable[..., Path]) -> Iterator[EdgeVLM]:
    with EdgeVLM.load(bundle(MODEL), settings=SETTINGS) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain(bundle: Callable[..., Path]) -> Iterator[EdgeVLM]:
    with EdgeVLM.load(bundle(MODEL), settings=SETTINGS.without_cache()) as loaded:
        yield loaded


@pytest.fixture
def pause() -> Pause:
    return Pause(CancelToken())


def test_only_tiles_that_changed_are_encoded(vlm: EdgeVLM, plain: EdgeVLM) -> None:
    """Anywhere in the picture; answers are those computed from nothing."""
    processor = vlm.manifest.image_processor
    base = picture(5, 300, 420)
    frames = [base]
    for top, left in ((0, 0), (150, 200), (292, 412), (10, 400)):
        frame = frames[-1].copy()
        frame[top : top + 8, left : left + 8] ^= 0xFF
        frames.append(frame)
    frames.append(base)  # all of its tiles were seen
    crops = [cut_tiles(frame, processor).crops for frame in frames]
    expected = [
        int((after != before).any(axis=(1, 2)).sum()) for before, after in itertools.pairwise(crops)
    ]
    lines = list(
        watch(vlm, Frames(*frames), "What?", cancel=CancelToken(), max_tokens=6)  # type: ignore[arg-type]
    )
    found = [line["encoded_crops"] for line in lines]
    assert found == [len(crops[0]), *expected[:-1], 0]
    assert all(2 <= n <= 5 for n in expected[:-1])  # the thumbnail, and up to four that overlap
    for line, frame in zip(lines, frames, strict=True):
        answer = plain.ask(frame, "What?", max_tokens=6)
        assert line["token_ids"] == answer.token_ids
        assert answer.encoded_crops == len(crops[0])


def test_frames_that_did_not_change(fake: FakeEngine) -> None:
    asked = fake.decoder.sampled  # once for every answer
    vlm = fake.load()
    one, two = picture(1), picture(2)

    def lines(**options: Any) -> list[dict[str, Any]]:
        asked.clear()
        source: Any = Frames(one, one, "broken", two, two, one)
        return list(watch(vlm, source, "What?", cancel=CancelToken(), max_tokens=3, **options))

    every = lines()
    assert [line.get("changed") for line in every] == [True, False, None, True, False, True]
    assert every[0]["token_ids"] == every[1]["token_ids"]
    assert [line["frame"] for line in every] == [1, 2, 3, 4, 5, 6]
    assert every[2]["error"] == "broken"
    assert len(asked) == 3
    some = lines(when_changed=True)
    assert [line["frame"] for line in some] == [1, 3, 4, 6]
    lines(temperature=1.0)
    assert len(asked) == 5  # another answer each time
    lines(temperature=1.0, seed=1)
    assert len(asked) == 3


def test_tolerance_averages_noise_out(vlm: EdgeVLM) -> None:
    rng = np.random.default_rng(0)
    base = picture(3, 100, 130) // 2 + 60
    noisy = (base + rng.integers(-6, 7, base.shape)).astype(np.uint8)
    moved = noisy.copy()
    moved[40:56, 64:80] = 200
    corner = base.copy()
    corner[-1, -1] ^= 0xFF  # alone in no block: 100 and 130 are not multiples of 16
    assert changed(base, noisy, 0)
    assert not changed(base, noisy, 3)
    assert changed(base, moved, 3)
    assert changed(base, corner, 3)
    assert changed(base, base[:-1], 3)
    source: Any = Frames(base, noisy, moved)
    found = list(
        watch(vlm, source, "?", cancel=CancelToken(), tolerance=3, when_changed=True, max_tokens=1)
    )
    assert [line["frame"] for line in found] == [1, 3]


def test_new_and_changed_files_in_order(tmp_path: Path, pause: Pause) -> None:
    (tmp_path / "old.png").write_bytes(png(picture(0)))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "below.png").mkdir()
    source = Folder(tmp_path, every=0, existing=False, settings=SETTINGS)
    frames = source.frames(pause)

    def add(name: str, seed: int, age: int) -> None:
        (tmp_path / name).write_bytes(png(picture(seed)))
        stamp = time.time() - age
        os.utime(tmp_path / name, (stamp, stamp))

    add("b.png", 1, 10)
    add("a.PNG", 2, 5)
    add(".hidden.png", 3, 1)
    found = [next(frames), next(frames)]
    assert [Path(frame.source).name for frame in found] == ["b.png", "a.PNG"]
    add("old.png", 4, 1)
    frame = next(frames)
    assert frame.source == str(tmp_path / "old.png")
    assert frame.pixels is not None
    assert np.array_equal(frame.pixels, picture(4))


def test_existing_files_are_frames_when_wanted(tmp_path: Path, pause: Pause) -> None:
    (tmp_path / "old.png").write_bytes(png(picture(0)))
    frames = Folder(tmp_path, every=0, existing=True, settings=SETTINGS).frames(pause)
    assert Path(next(frames).source).name == "old.png"


def test_a_file_that_is_still_written_is_waited_for(tmp_path: Path, pause: Pause) -> None:
    """Also when the writer makes a pause that is longer than the one that counts."""
    data = png(picture(1, 200, 200))
    frames = Folder(tmp_path, every=0, existing=False, settings=SETTINGS).frames(pause)

    def write() -> None:
        with (tmp_path / "slow.png").open("wb") as file:
            for part in range(8):
                file.write(data[part * len(data) // 8 : (part + 1) * len(data) // 8])
                file.flush()
                time.sleep(2.5 * SETTLE_SECONDS if part == 3 else 0.05)

    writer = threading.Thread(target=write)
    writer.start()
    frame = next(frames)
    writer.join()
    assert frame.error is None
    assert frame.pixels is not None
    assert np.array_equal(frame.pixels, picture(1, 200, 200))


def test_a_broken_file_is_told_once(tmp_path: Path, pause: Pause) -> None:
    source = Folder(tmp_path, every=0, existing=False, settings=SETTINGS, broken_after=0.6)
    frames = source.frames(pause)
    (tmp_path / "broken.png").write_bytes(png(picture(1))[:500])
    assert "damaged" in str(next(frames).error)
    (tmp_path / "good.png").write_bytes(png(picture(2)))
    assert Path(next(frames).source).name == "good.png"


def test_content_decides_what_is_a_picture(tmp_path: Path, pause: Pause) -> None:
    data = png(picture(1))
    for number, name in enumerate(("a.jfif", "b.jpe", "no extension", "c.png.bak", "d.tif")):
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, (1e9 + number, 1e9 + number))
    others = {
        "e.heic": b"\0\0\0\x18ftypheic" + bytes(50),
        "f.html": b"<html>",
        "notes.txt": b"hello",
        "nothing": b"",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    said: list[str] = []
    how: dict[str, Any] = {"existing": True, "broken_after": 0.5, "skipped": said.append}
    frames = Folder(tmp_path, every=0, settings=SETTINGS, **how).frames(pause)
    found = [next(frames) for _ in range(6)]
    assert [Path(frame.source).name for frame in found] == [
        *("a.jfif", "b.jpe", "no extension", "c.png.bak", "d.tif", "page.jpg")
    ]
    assert "is an HTML page" in str(found[-1].error)  # its name promises a picture
    (tmp_path / "last.png").write_bytes(data)
    assert Path(next(frames).source).name == "last.png"
    assert sorted(line.split(": ")[0] for line in said) == [
        f"skipped {tmp_path / name}" for name in others
    ]
    assert all(line.isprintable() for line in said)
    assert any("is text, which is not read" in line for line in said)


def test_a_folder_that_goes(tmp_path: Path, pause: Pause) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(InputError, match="no such folder"):
        Folder(folder, every=0, existing=False, settings=SETTINGS)
    folder.mkdir()
    source = Folder(folder, every=0, existing=False, settings=SETTINGS)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="folder"):
        next(source.frames(pause))


def test_a_command_is_run_for_each_frame(tmp_path: Path, pause: Pause) -> None:
    path = tmp_path / "it is here.png"
    frames = Command(printing(path), every=0, settings=SETTINGS).frames(pause)
    for seed in (1, 2):
        path.write_bytes(png(picture(seed)))
        pixels = next(frames).pixels
        assert pixels is not None
        assert np.array_equal(pixels, picture(seed))
    path.write_bytes(b"no picture")
    assert "is text, which is not read" in str(next(frames).error)
    path.unlink()
    assert "ended with code 1" in str(next(frames).error)


def test_a_command_is_bounded(pause: Pause) -> None:
    def error(code: str, seconds: float = 30) -> str:
        line = f'"{sys.executable}" -c "{code}"'
        started = time.monotonic()
        source = Command(line, every=0, settings=SETTINGS, seconds=seconds, max_bytes=1 << 20)
        frame = next(source.frames(pause))
        assert time.monotonic() - started < 20
        return str(frame.error)

    endless = "import sys\nwhile 1: sys.stdout.buffer.write(bytes(9999))"
    assert "more than 1 MiB" in error(endless)
    assert "within 0.5 s" in error("import time; time.sleep(60)", 0.5)
    quiet = "import os, time; os.close(1); time.sleep(60)"
    assert "within 0.5 s" in error(quiet, 0.5)
    assert "is empty" in error("pass")


def test_a_command_that_does_not_exist(pause: Pause) -> None:
    for line in ("", "no-such-program-here -x", "'"):
        with pytest.raises(InputError, match="--command"):
            Command(line, every=0, settings=SETTINGS)


@pytest.mark.parametrize("kind", ["folder", "command"])
def test_sources_stop_when_asked(tmp_path: Path, kind: str) -> None:
    cancel = CancelToken()
    source: Source
    if kind == "folder":
        source = Folder(tmp_path, every=100, existing=False, settings=SETTINGS)
    else:
        line = f'"{sys.executable}" -c "import time; time.sleep(60)"'
        source = Command(line, every=100, settings=SETTINGS)
    threading.Timer(0.3, cancel.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        next(source.frames(Pause(cancel)))
    assert time.monotonic() - started < 5


class FakeCapture:
    """OpenCV's, with a queue of frames that were seen before."""

    frames = 20

    def __init__(self, number: int) -> None:
        self.number = number
        self.grabbed = 0
        self.released = False

    def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
        return self.number == 0

    def grab(self) -> bool:
        self.grabbed += 1
        return self.grabbed <= self.frames

    def retrieve(self) -> tuple[bool, Pixels | None]:
        if self.grabbed > self.frames:
            return False, None
        return True, picture(self.grabbed)[..., ::-1]

    def release(self) -> None:
        self.released = True


def test_a_camera_gives_its_newest_frame(pause: Pause, monkeypatch: pytest.MonkeyPatch) -> None:
    logging = types.SimpleNamespace(setLogLevel=lambda _: None, LOG_LEVEL_SILENT=0)
    fake: Any = types.ModuleType("cv2")
    fake.VideoCapture = FakeCapture
    fake.utils = types.SimpleNamespace(logging=logging)
    monkeypatch.setitem(sys.modules, "cv2", fake)
    with pytest.raises(InputError, match="camera 1: there is none"):
        Camera(1, every=0)
    camera = Camera(0, every=0)
    frames = camera.frames(pause)
    for expected in (5, 10, 15, 20):
        frame = next(frames)
        assert frame.pixels is not None
        assert np.array_equal(frame.pixels, picture(expected))  # RGB again
    with pytest.raises(InputError, match="no picture any more"):
        next(frames)
    assert camera._capture.released


def test_a_camera_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"pip install 'edge-vlm\[camera\]'"):
        Camera(0, every=0)


def test_the_command_prints_json_lines(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "1.png").write_bytes(png(picture(1)))
    (folder / "2.png").write_bytes(png(picture(1)))
    result = run(
        *("watch", "--dir", folder, "--existing", "--count", "2", "--max-tokens", "4", "What?")
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["token_ids"] == second["token_ids"]
    assert (first["changed"], second["changed"]) == (True, False)
    assert first["source"].endswith("1.png")
    assert not (Path(os.environ["EDGE_VLM_CACHE"]) / "pictures").exists()  # nothing is kept


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["What?"], "give one of"),
        (["--dir", ".", "--camera", "0", "What?"], "give one of"),
        (["--dir", ".", " "], "empty"),
        (["--dir", "none", "What?"], "no such folder"),
        (["--command", "no-such-program-here", "What?"], "no program"),
        (["--command", "x", "--existing", "What?"], "--existing"),
    ],
)
def test_bad_usage_ends_in_a_line(run: Run, arguments: list[str], word: str) -> None:
    assert_one_line(run("watch", *arguments), 2, word)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_it(bundle: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(picture(1)))
    process = subprocess.Popen(
        [COMMAND, "watch", "--dir", tmp_path, "--existing", "--max-tokens", "2", "What?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "EDGE_VLM_MODEL": str(bundle(MODEL)), "EDGE_VLM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    assert process.stdout
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert json.loads(line)["frame"] == 1
    assert (process.returncode, rest, errors.split()) == (130, b"", [b"stopped"])
