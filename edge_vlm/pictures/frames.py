"""Pictures that keep coming: from a folder, a camera or a command."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import stat
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import ImageError, InputError, label
from edge_vlm.pictures.damage import N_BYTES, format_of
from edge_vlm.pictures.image import EXTRA_FORMATS, FORMATS, MAX_FILE_BYTES, open_image

if TYPE_CHECKING:
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.progress import CancelToken

COMMAND_SECONDS = 30.0
SETTLE_SECONDS = 0.3  # a file that did not change for so long is taken as written
BROKEN_SECONDS = 5.0  # one that cannot be read may still be written for so long
_POLL_SECONDS = 0.1
_CAMERA_QUEUE = 5  # frames that a driver may have waiting
_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".gif")
_log = logging.getLogger(__name__)

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Frame:
    """One picture, or why there is none."""

    source: str
    pixels: UInt8 | None = None  # (height, width, 3)
    alpha: str | None = None  # see edge_vlm.pictures.image.Opened
    error: str | None = None


class Pause:
    """Waits that a cancel token ends."""

    def __init__(self, cancel: CancelToken) -> None:
        self._cancel = cancel
        self._event = threading.Event()
        cancel.listen(self._event.set)

    def wait(self, seconds: float) -> None:
        """Wait, or raise ``Cancelled``."""
        deadline = time.monotonic() + seconds
        self._cancel.check()
        # In short steps: on Windows, a wait holds back Ctrl-C.
        while (left := deadline - time.monotonic()) > 0:
            self._event.wait(min(left, _POLL_SECONDS))
            self._cancel.check()


class Folder:
    """New and changed pictures in a folder, the oldest first.

    A file counts as written when its size and time stay the same for a moment and it can be read.

    Args:
        path: what is in folders below it is not looked at.
        every: seconds between two looks.
        existing: whether pictures that are there at the beginning count as new.
        settings: limits for pictures.
        broken_after: seconds that a file which cannot be read may still be written for.
        skipped: told, in a line, of each file that is no picture.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(
        self,
        path: Path,
        *,
        every: float,
        existing: bool,
        settings: MachineSettings,
        broken_after: float = BROKEN_SECONDS,
        skipped: Callable[[str], None] = _log.warning,
    ) -> None:
        if not path.is_dir():
            raise InputError(f"{label(path)}: no such folder")
        self._path = path
        self._every = max(every, _POLL_SECONDS)
        self._settings = settings
        self._broken_after = broken_after
        self._skipped = skipped
        extra = (name.upper() for name in settings.image_formats)
        self._formats = (*FORMATS, *(name for name in extra if name in EXTRA_FORMATS))
        self._done = {} if existing else self._stamps()  # the state in which each was answered

    def frames(self, pause: Pause) -> Iterator[Frame]:
        """Pictures without end, or ``InputError`` when the folder is gone."""
        first_seen: dict[Path, tuple[tuple[int, ...], float]] = {}
        while True:
            stamps = self._stamps()
            self._done = {path: was for path, was in self._done.items() if path in stamps}
            waiting = False
            for path, stamp in sorted(stamps.items(), key=lambda item: item[1]):
                if self._done.get(path) == stamp:
                    continue
                now = time.monotonic()
                if first_seen.get(path, (None,))[0] != stamp:
                    first_seen[path] = (stamp, now)
                age = now - first_seen[path][1]
                if age < SETTLE_SECONDS:
                    waiting = True
                    continue
                frame = _load(str(path), path, self._settings)
                if frame.error and age < self._broken_after:
                    continue
                if frame.error and not self._is_picture(path):
                    self._skipped(f"skipped {frame.error}")
                    self._done[path] = stamp
                    continue
                self._done[path] = stamp
                first_seen.pop(path, None)
                yield frame
            pause.wait(min(self._every, SETTLE_SECONDS) if waiting else self._every)

    def _is_picture(self, path: Path) -> bool:
        """Whether a file is one by its first bytes, or at least by its name."""
        if path.suffix.lower() in _SUFFIXES:
            return True
        try:
            with path.open("rb") as file:
                return format_of(file.read(N_BYTES)) in self._formats
        except OSError:
            return False

    def _stamps(self) -> dict[Path, tuple[int, ...]]:
        """Modification time, size and inode of each file."""
        found: dict[Path, tuple[int, ...]] = {}
        try:
            with os.scandir(self._path) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if entry.name.startswith("."):
                        continue
                    try:
                        info = path.stat()
                    except OSError:  # it was removed, or is a link to nothing
                        continue
                    if stat.S_ISREG(info.st_mode):
                        found[path] = (info.st_mtime_ns, info.st_size, info.st_ino)
        except OSError as error:
            raise InputError(f"{label(self._path)}: {error.strerror or error}") from error
        return found


class _Regular(ABC):
    """A source that is asked for a frame every so many seconds."""

    def __init__(self, every: float) -> None:
        self._every = every

    def frames(self, pause: Pause) -> Iterator[Frame]:
        """Frames without end, each as it is when it is asked for."""
        try:
            while True:
                started = time.monotonic()
                pause.wait(0)
                yield self._frame(pause)
                pause.wait(self._every - (time.monotonic() - started))
        finally:
            self._release()

    @abstractmethod
    def _frame(self, pause: Pause) -> Frame:
        """The next one."""

    def _release(self) -> None:  # noqa: B027 - most hold nothing
        """After the last frame."""


class Command(_Regular):
    """The pictures that a command writes to stdout, one a run.

    Args:
        line: program and arguments, split as a shell would; no shell runs.
        every: seconds from the beginning of one run to that of the next.
        settings: limits for pictures.
        seconds: after which a run is ended.
        max_bytes: that a run may write.

    Raises:
        InputError: there is no such program.
    """

    def __init__(
        self,
        line: str,
        *,
        every: float,
        settings: MachineSettings,
        seconds: float = COMMAND_SECONDS,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        try:
            self._arguments = shlex.split(line, posix=os.name == "posix")
        except ValueError as error:
            raise InputError(f"--command: {error}") from error
        if not self._arguments or shutil.which(self._arguments[0]) is None:
            raise InputError(f"--command: there is no program {line.split(' ')[0]!r}")
        super().__init__(every)
        self._source = label(self._arguments[0])
        self._settings = settings
        self._seconds = seconds
        self._max_bytes = max_bytes

    def _frame(self, pause: Pause) -> Frame:
        try:
            return _load(self._source, self._run(pause), self._settings)
        except ImageError as error:
            return Frame(self._source, error=str(error))

    def _run(self, pause: Pause) -> bytes:
        name = self._source
        try:
            process = subprocess.Popen(  # noqa: S603 - the user's own command, without a shell
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,  # so that what it starts can be ended with it
            )
        except OSError as error:
            raise ImageError(f"{name}: {error.strerror or error}") from error
        written = b""

        def read() -> None:
            nonlocal written
            if process.stdout:
                with process.stdout as stdout:
                    written = stdout.read(self._max_bytes + 1)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        deadline = time.monotonic() + self._seconds
        try:
            while reader.is_alive() or (process.poll() is None and len(written) <= self._max_bytes):
                if time.monotonic() > deadline:
                    raise ImageError(f"{name}: did not end within {self._seconds:g} s")
                reader.join(_POLL_SECONDS / 10)
                pause.wait(0)
        finally:
            _end(process)
            reader.join()
        if len(written) > self._max_bytes:
            raise ImageError(f"{name}: wrote more than {self._max_bytes >> 20} MiB")
        if process.returncode:
            raise ImageError(f"{name}: ended with code {process.returncode}")
        return written


class Camera(_Regular):
    """Frames of a camera, through OpenCV.

    Args:
        number: the camera's; 0 is the first.
        every: seconds from one frame to the next.

    Raises:
        InputError: OpenCV is not installed, or there is no such camera.
    """

    def __init__(self, number: int, *, every: float) -> None:
        try:
            import cv2
        except ImportError as error:
            raise InputError("a camera needs OpenCV: pip install 'edge-vlm[camera]'") from error
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        super().__init__(every)
        self._source = f"camera {number}"
        self._capture = cv2.VideoCapture(number)
        if not self._capture.isOpened():
            raise InputError(f"{self._source}: there is none, or another program uses it")

    def _frame(self, pause: Pause) -> Frame:
        for _ in range(_CAMERA_QUEUE):  # the driver's queue holds what was seen before
            self._capture.grab()
        good, bgr = self._capture.retrieve()
        if not good:
            raise InputError(f"{self._source}: gives no picture any more")
        return Frame(self._source, np.ascontiguousarray(bgr[..., ::-1]))

    def _release(self) -> None:
        self._capture.release()


Source = Folder | Command | Camera


def _load(source: str, image: Any, settings: MachineSettings) -> Frame:
    try:
        opened = open_image(image, settings)
    except ImageError as error:
        return Frame(source, error=str(error))
    return Frame(source, opened.pixels, opened.alpha)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what still runs, with what it has started."""
    if process.poll() is None:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
