"""The store on disk: what is read is what was written, whatever happens to the files."""

from __future__ import annotations

import errno
import io
import logging
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import xxhash

from edge_vlm.machine.store import FORMAT_VERSION, Entry, Store, make_key

LIMIT = 1 << 20
N_KILLS = int(os.environ.get("EDGE_VLM_TEST_KILLS", "4"))  # a fixture clears the variables


def entry(number: int, size: int = 10_000, kind: str = "tile") -> Entry:
    payload = np.random.default_rng(number).integers(0, 256, size, np.uint8)
    return Entry(kind, make_key({"number": number}), payload)


def write(store: Store, *entries: Entry) -> None:
    store.write_soon(entries)
    store.flush()


def holds(store: Store, wanted: Entry) -> bool:
    """Whether the entry is there; what is there must be right."""
    found = store.read(wanted.kind, wanted.key)
    assert found is None or found.tobytes() == wanted.payload.tobytes()
    return found is not None


def disk_use(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "pictures"


@pytest.fixture
def store(folder: Path) -> Store:
    return Store(folder, LIMIT)


def file_of(store: Store, wanted: Entry) -> Path:
    return store.folder / "entries" / f"{wanted.key.hex()}.{wanted.kind}"


def test_what_was_written_is_read(store: Store) -> None:
    entries = [entry(1), entry(2, kind="prefix"), entry(3, size=0)]
    assert not any(holds(store, wanted) for wanted in entries)
    write(store, *entries)
    assert all(holds(store, wanted) for wanted in entries)
    assert store.read("prefix", entries[0].key) is None
    info = store.info()
    assert info.entries == {"tile": 2, "prefix": 1}
    assert info.used_bytes == sum(info.bytes.values()) >= 20_000


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_only_the_user_may_read(store: Store, folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o755)
    write(store, entry(1))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert len(modes) == 5
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners of POSIX")
def test_another_users_folder_is_not_used(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, entry(1))
    monkeypatch.setattr(os, "geteuid", lambda: store.folder.stat().st_uid + 1)
    assert not holds(store, entry(1))
    write(store, entry(2))
    assert "belongs to another user" in caplog.text
    monkeypatch.undo()
    assert not holds(store, entry(2))
    assert holds(store, entry(1))


def test_a_flipped_bit_anywhere_is_found(store: Store) -> None:
    """The whole header, and places in the payload."""
    wanted = entry(1, size=2000)
    write(store, wanted)
    path = file_of(store, wanted)
    good = path.read_bytes()
    n_header = len(good) - 2000
    rng = random.Random(0)
    for position in [*range(n_header + 8), *rng.sample(range(len(good)), 50), len(good) - 1]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert store.read(wanted.kind, wanted.key) is None
        assert not path.exists()
    path.write_bytes(good)
    assert holds(store, wanted)


def test_cut_longer_and_foreign_files_are_dropped(store: Store) -> None:
    wanted, other = entry(1), entry(2)
    write(store, wanted, other)
    path, other_path = file_of(store, wanted), file_of(store, other)
    good = path.read_bytes()
    kind = good.replace(b"tile", b"new!")
    version = bytearray(good)
    version[8] += 1
    for data in (
        *(good[:cut] for cut in (0, 1, 50, 100, 5000, len(good) - 1)),
        good + b"x",
        other_path.read_bytes(),  # right in itself, but not under this name
        kind,
        bytes(version),
        b"hello",
    ):
        path.write_bytes(data)
        assert store.read(wanted.kind, wanted.key) is None
        assert not path.exists()
    write(store, wanted)
    assert holds(store, wanted)


def test_a_newer_format_is_not_read(store: Store) -> None:
    """Its checksums are right."""
    write(store, entry(1))
    path = file_of(store, entry(1))
    data = path.read_bytes()
    for version in (FORMAT_VERSION, FORMAT_VERSION + 1):
        header = data[:8] + version.to_bytes(4, "little") + data[12:76]
        path.write_bytes(header + xxhash.xxh3_128_digest(header) + data[92:])
        assert holds(store, entry(1)) == (version == FORMAT_VERSION)


def test_the_longest_unused_goes_first(folder: Path) -> None:
    store = Store(folder, 10 * 12_288)  # ten entries
    entries = [entry(number) for number in range(10)]
    for number, wanted in enumerate(entries):
        write(store, wanted)
        os.utime(file_of(store, wanted), (1000 + number, 1000 + number))
    assert holds(store, entries[0])  # used now
    write(store, entry(10), entry(11))
    assert [holds(store, wanted) for wanted in entries] == [True, False, False] + [True] * 7
    assert holds(store, entry(10))
    assert holds(store, entry(11))
    assert store.info().used_bytes <= 10 * 12_288


def test_the_limit_holds(folder: Path) -> None:
    store = Store(folder, 100_000)
    rng = random.Random(1)
    for number in range(60):
        write(store, *(entry(number * 3 + i, rng.randrange(60_000)) for i in range(3)))
        assert store.info().used_bytes <= 100_000
        assert disk_use(folder) <= 100_000
    write(store, entry(1000, 100_001))
    assert not holds(store, entry(1000))
    assert store.info().used_bytes > 0  # nothing was given up for it


def test_at_most_a_tenth_of_the_free_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000))
    assert store.info().limit_bytes == 30_000
    write(store, *(entry(number) for number in range(5)))
    assert store.info().used_bytes <= 33_000
    assert sum(holds(store, entry(number)) for number in range(5)) == 2


def test_the_number_of_entries_is_bounded(folder: Path) -> None:
    store = Store(folder, LIMIT, max_entries=5)
    for number in range(9):
        write(store, entry(number, 10))
    assert sum(store.info().entries.values()) == 5


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile(io.FileIO):
    """Opens and takes nothing."""

    write = full  # type: ignore[assignment]


def open_full(descriptor: int, *_: Any, **__: Any) -> FullFile:
    return FullFile(descriptor, "wb")


FULL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "mkdir": lambda patch: patch.setattr(Path, "mkdir", full),
    "mkstemp": lambda patch: patch.setattr(tempfile, "mkstemp", full),
    "write": lambda patch: patch.setattr(os, "fdopen", open_full),
    "fsync": lambda patch: patch.setattr(os, "fsync", full),
    "replace": lambda patch: patch.setattr(os, "replace", full),
    "lock": lambda patch: patch.setattr(filelock.FileLock, "acquire", full),
}


@pytest.mark.parametrize("call", FULL)
def test_a_full_disk_costs_the_entry_only(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    if call != "mkdir":
        write(store, entry(1))
    with monkeypatch.context() as patch:
        FULL[call](patch)
        for number in (2, 3):
            write(store, entry(number))
    assert caplog.text.count("No space left on device") == 1  # told once
    assert not holds(store, entry(2))
    if call != "mkdir":
        assert holds(store, entry(1))
        assert list((store.folder / "new").iterdir()) == []
    write(store, entry(2))
    assert holds(store, entry(2))


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits of POSIX")
def test_a_write_that_is_cut_short(folder: Path) -> None:
    """The kernel refuses the bytes beyond a limit, as at a quota."""
    code = f"""
import resource, signal, logging
import tests.machine.test_store as t
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = t.Store(Path({str(folder)!r}), 1 << 30)
t.write(store, t.entry(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
t.write(store, t.entry(2, 100_000))
assert not t.holds(store, t.entry(2)) and t.holds(store, t.entry(1))
assert list((store.folder / "new").iterdir()) == []
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "File too large" in result.stderr


def test_a_folder_that_cannot_be_written_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Root may write everywhere, so the system's answer is imitated."""
    write(store, entry(1))
    real_open = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real_open(path, flags, *rest, **named)

    def refuse_utime(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(os, "utime", refuse_utime)
        assert holds(store, entry(1))
        write(store, entry(2))
    assert "Read-only file system" in caplog.text


def test_damage_is_told_only_when_asked(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    write(store, entry(1))
    file_of(store, entry(1)).write_bytes(b"x")
    with caplog.at_level(logging.WARNING, "edge_vlm"):
        assert not holds(store, entry(1))
    assert caplog.text == ""


def test_clear_removes_everything(store: Store) -> None:
    assert store.clear().used_bytes == 0
    write(store, entry(1), entry(2))
    (store.folder / "new" / "left").write_bytes(b"half")
    assert sum(store.clear().entries.values()) == 2
    assert not any(path.is_file() for path in store.folder.rglob("*") if path.name != "lock")
    write(store, entry(1))
    assert holds(store, entry(1))


def test_what_a_killed_writer_left_is_removed(store: Store) -> None:
    write(store, entry(1))
    left = store.folder / "new" / "tmpabc"
    left.write_bytes(bytes(100_000))
    assert store.info().used_bytes < 100_000
    write(store, entry(1))
    assert not left.exists()


LOOP = """
import sys, itertools
from pathlib import Path
import tests.machine.test_store as t
store = t.Store(Path(sys.argv[1]), int(sys.argv[2]))
print("ready", flush=True)
for number in itertools.count(int(sys.argv[3])):
    wanted = t.entry(number % 12, 200_000)
    t.holds(store, wanted)
    t.write(store, wanted)
    if number == int(sys.argv[4]):
        break
"""


def start_loop(folder: Path, limit: int, first: int, last: int = -1) -> subprocess.Popen[bytes]:
    arguments = [str(folder), str(limit), str(first), str(last)]
    return subprocess.Popen([sys.executable, "-c", LOOP, *arguments], stdout=subprocess.PIPE)


def test_killed_writers_leave_nothing_that_counts(folder: Path) -> None:
    limit = 1_000_000
    store = Store(folder, limit)
    rng = random.Random(0)
    for _ in range(N_KILLS):
        process = start_loop(folder, limit, rng.randrange(12))
        assert process.stdout
        process.stdout.readline()
        time.sleep(rng.random() * 0.1)
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.communicate()
        assert disk_use(folder) <= limit
        for number in range(12):
            holds(store, entry(number, 200_000))
    write(store, entry(100))
    assert holds(store, entry(100))
    assert list((folder / "new").iterdir()) == []


def test_several_processes_at_once(folder: Path) -> None:
    limit = 1_000_000
    processes = [start_loop(folder, limit, first, first + 15) for first in (0, 0, 3)]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, Store(folder, limit).info().used_bytes)
        time.sleep(0.02)
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert 0 < most <= limit


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1], mode=0o600):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_that_another_process_holds_costs_a_second_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, entry(0))
    command = [sys.executable, "-c", HOLD, str(store.folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        seconds = []
        for number in range(1, 4):
            started = time.monotonic()
            write(store, entry(number), entry(10 + number))
            seconds.append(time.monotonic() - started)
        assert holds(store, entry(0))  # it is still read
        holder.communicate()
    assert 0.9 < seconds[0] < 2.5
    assert max(seconds[1:]) < 0.5
    assert caplog.text.count("another process holds it") == 1
    assert not any(holds(store, entry(number)) for number in range(1, 4))
    write(store, entry(5))  # and once it is free, it is taken
    assert holds(store, entry(5))


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_a_disk_without_locks_says_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        write(store, entry(1))
        write(store, entry(2))
    assert seen == []
    assert caplog.text == ""
    assert holds(store, entry(2))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def socket_at(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def full_folder(path: Path) -> None:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_bytes(b"x")


def link_to_folder(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    if not elsewhere.exists():
        full_folder(elsewhere)
    path.symlink_to(elsewhere)


def link_to_file(path: Path) -> None:
    elsewhere = path.parents[2] / "file"
    elsewhere.write_bytes(b"x")
    path.symlink_to(elsewhere)


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


FOREIGN: list[Callable[[Path], None]] = [full_folder]
if os.name == "posix":
    FOREIGN += [pipe, socket_at, link_to_folder, link_to_file, dangling_link]


@pytest.mark.parametrize("make", FOREIGN)
def test_what_is_no_file_is_neither_opened_nor_kept(
    store: Store, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """In the place of an entry, beside the entries, among new files, and in the folders' place."""
    entries, new = store.folder / "entries", store.folder / "new"
    write(store, entry(1), entry(2))
    file_of(store, entry(1)).unlink()
    make(file_of(store, entry(1)))
    make(entries / "other")
    make(new / "left")
    assert not holds(store, entry(1))
    write(store, entry(1))
    assert holds(store, entry(1))
    assert holds(store, entry(2))
    assert not os.path.lexists(entries / "other")
    assert list(new.iterdir()) == []
    if make is not link_to_folder:  # which may be meant
        for folder in (entries, new):
            shutil.rmtree(folder)
            if make is not full_folder:
                make(folder)
        write(store, entry(1))
        assert holds(store, entry(1))
    make(entries / "other")
    make(new / "left")
    assert store.clear().entries["tile"] >= 1
    assert list(entries.iterdir()) == list(new.iterdir()) == []
    assert caplog.text == ""
    if make is link_to_folder:
        assert (store.folder.parent / "elsewhere" / "inner" / "file").exists()


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_a_link_to_a_right_entry_is_not_followed(store: Store, tmp_path: Path) -> None:
    write(store, entry(1))
    path = file_of(store, entry(1))
    path.rename(tmp_path / "entry")
    path.symlink_to(tmp_path / "entry")
    assert not holds(store, entry(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_writes_with_a_thread_of_its_own(folder: Path) -> None:
    code = f"""
import os, signal, warnings
from concurrent.futures import Future
from pathlib import Path
import tests.machine.test_store as t
warnings.simplefilter("ignore")  # a fork beside threads
store = t.Store(Path({str(folder)!r}), t.LIMIT)
t.write(store, t.entry(1))
store._waiting.append(Future())  # as if the thread had been at work
if not (child := os.fork()):
    signal.alarm(20)
    t.write(store, t.entry(2))
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert t.holds(store, t.entry(1)) and t.holds(store, t.entry(2))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(os.name != "posix", reason="places of POSIX")
@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/cache", "/proc/none/cache"])
def test_a_place_that_cannot_be_costs_a_line(place: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(Path(place), LIMIT)
    for number in range(2):
        assert not holds(store, entry(number))
        write(store, entry(number))
    assert caplog.text.count("pictures are not cached") == 1
