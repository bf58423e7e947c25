"""Bytes kept on disk between processes: checksummed, bounded, the longest unused dropped first.

    lock       held by the one process that writes
    new/       a file being written; one that is found under the lock was left by a killed process
    entries/   <key>.<kind>: a header, then the payload

diskcache was looked at first: it has no checksums and no fsync, pickles values and keeps an SQLite
index that has to agree with the files. Here entries may be hundreds of megabytes, are written once
and read in one go, and nothing but the entry itself has to be believed.

Checksums are XXH3 (128 bits): they find damage at the speed of memory, 204 MB in 0.02 s where
CRC-32 takes 0.1 s and SHA-256 0.2 s. Keys are SHA-256, because pictures come from strangers, who
must not be able to make two that share an entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import struct
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

if TYPE_CHECKING:
    from edge_vlm.machine.settings import MachineSettings

FORMAT_VERSION = 1
KINDS = ("tile", "prefix")
MAX_ENTRIES = 16_384  # bounds the time it takes to look for the longest unused
FREE_DISK_SHARE = 10  # at most one part in ten of what would be free without the cache
_HEADER = struct.Struct("<8sI8s32sQ16s")  # magic, version, kind, key, payload size and checksum
_MAGIC = b"edge-vlm"
_DIGEST_BYTES = 16
_HEADER_BYTES = _HEADER.size + _DIGEST_BYTES
_BLOCK = 4096  # files take whole blocks of the disk
_LOCK_SECONDS = 1.0  # once; then nothing is written while another process holds the lock
_CLEAR_SECONDS = 10.0
# Only a regular file is read: opening a named pipe would wait for ever, a link leads elsewhere.
_READ_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY")
)

UInt8 = npt.NDArray[np.uint8]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """Something to keep."""

    kind: str  # one of KINDS
    key: bytes  # of make_key
    payload: npt.NDArray[Any]  # contiguous; its bytes are kept, not its type and shape


@dataclass(frozen=True)
class StoreInfo:
    """What is on disk; bytes as the disk counts them."""

    folder: str
    limit_bytes: int
    used_bytes: int
    entries: dict[str, int]  # of each kind
    bytes: dict[str, int]


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    used_ns: int


def make_key(identity: Mapping[str, Any], *parts: bytes | memoryview) -> bytes:
    """32 bytes that stand for ``parts`` computed by what ``identity`` describes."""
    digest = hashlib.sha256()
    for part in (json.dumps(identity, sort_keys=True).encode(), *parts):
        digest.update(memoryview(part).nbytes.to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def open_store(settings: MachineSettings) -> Store | None:
    """The store that the settings ask for."""
    if settings.cache is None or not settings.cache_size:
        return None
    return Store(Path(settings.cache) / "pictures", settings.cache_size)


class Store:
    """Entries in a folder that only the user may read.

    Reading and writing never raise what the disk, another process or a damaged entry causes: an
    entry is then missing, or not kept, and a line goes to this module's logger. The folder is
    created when something is kept; ``limit`` is in bytes.
    """

    def __init__(self, folder: Path, limit: int, max_entries: int = MAX_ENTRIES) -> None:
        self.folder = folder
        self._entries = folder / "entries"
        self._new = folder / "new"
        self._limit = limit
        self._max_entries = max_entries
        self._writer: ThreadPoolExecutor | None = None
        self._waiting: list[Future[None]] = []
        self._guard = threading.Lock()
        self._pid = os.getpid()
        self._patience = _LOCK_SECONDS
        self._warned = False

    def read(self, kind: str, key: bytes) -> UInt8 | None:
        """The payload of an entry, or None; a damaged or foreign one is dropped."""
        path = self._path(kind, key)
        try:
            with open_regular(path) as file:
                self._check_owner()
                payload = _read_checked(file, kind, key)
                if payload is None:
                    _log.info("%s: is damaged; dropped", path)
                else:
                    with contextlib.suppress(OSError):
                        os.utime(path)  # the time of its last use
        except FileNotFoundError:
            return None
        except (OSError, MemoryError) as error:
            _log.info("%s: %s", path, error)
            return None
        if payload is None:
            self.drop(kind, key)
        return payload

    def drop(self, kind: str, key: bytes) -> None:
        """Remove an entry."""
        with contextlib.suppress(OSError):
            _remove(self._path(kind, key))

    def write_soon(self, entries: Sequence[Entry]) -> None:
        """Keep entries; a thread writes them. ``flush`` waits for it."""
        if not entries:
            return
        self._forget_parent()
        with self._guard:
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1, "edge-vlm cache")
            try:
                self._waiting.append(self._writer.submit(self._write, list(entries)))
                return
            except RuntimeError:  # the main thread has ended: no pool works any more
                pass
        self._write(entries)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._forget_parent()
        with self._guard:
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.result()

    def _forget_parent(self) -> None:
        """A fork leaves the thread behind that writes, and what it was to write."""
        if self._pid != os.getpid():
            self._pid, self._guard = os.getpid(), threading.Lock()
            self._writer, self._waiting = None, []

    def info(self) -> StoreInfo:
        """What is kept now.

        Raises:
            OSError: the folder cannot be read.
        """
        files, _ = self._found()
        by_kind = {kind: [f for f in files if f.path.suffix == f".{kind}"] for kind in KINDS}
        return StoreInfo(
            folder=str(self.folder),
            limit_bytes=self._allowed(files),
            used_bytes=sum(file.size for file in files),
            entries={kind: len(found) for kind, found in by_kind.items()},
            bytes={kind: sum(file.size for file in found) for kind, found in by_kind.items()},
        )

    def clear(self) -> StoreInfo:
        """Remove everything; returns what there was.

        Raises:
            OSError: something cannot be removed, or another process keeps writing.
        """
        before = self.info()
        if self.folder.is_dir():
            with self._locked(_CLEAR_SECONDS):
                files, others = self._found()
                for path in [*(file.path for file in files), *others]:
                    _remove(path)
        return before

    def _path(self, kind: str, key: bytes) -> Path:
        return self._entries / f"{key.hex()}.{kind}"

    def _write(self, entries: Sequence[Entry]) -> None:
        try:
            self._make_folder()
            with self._locked(self._patience):
                self._write_locked(entries)
        except (OSError, MemoryError) as error:
            if isinstance(error, TimeoutError):
                self._patience = 0
            level = logging.INFO if self._warned else logging.WARNING
            self._warned = True
            _log.log(level, "pictures are not cached: %s", error)

    def _write_locked(self, entries: Sequence[Entry]) -> None:
        files, others = self._found()
        for path in others:
            with contextlib.suppress(OSError):
                _remove(path)
        files.sort(key=lambda file: file.used_ns, reverse=True)
        known = {file.path for file in files}
        allowed = self._allowed(files)
        used, count = sum(file.size for file in files), len(files)
        for entry in entries:
            path = self._path(entry.kind, entry.key)
            size = _on_disk(_HEADER_BYTES + entry.payload.nbytes)
            if path in known or size > allowed:
                continue
            while files and (used + size > allowed or count >= self._max_entries):
                oldest = files.pop()
                oldest.path.unlink(missing_ok=True)
                used -= oldest.size
                count -= 1
            if used + size > allowed:
                break  # this very call has filled it
            self._write_file(path, entry)
            used += size
            count += 1
        _sync_folder(self._entries)

    def _write_file(self, path: Path, entry: Entry) -> None:
        payload = entry.payload.reshape(-1).view(np.uint8).data
        header = _HEADER.pack(
            _MAGIC,
            FORMAT_VERSION,
            entry.kind.encode(),
            entry.key,
            len(payload),
            xxhash.xxh3_128_digest(payload),
        )
        descriptor, name = tempfile.mkstemp(dir=self._new)  # readable by the user alone
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(header + xxhash.xxh3_128_digest(header))
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        finally:
            with contextlib.suppress(OSError):  # it is renamed if all went well
                os.unlink(name)

    def _found(self) -> tuple[list[_File], list[Path]]:
        """All entries, and what is none: links, pipes, folders.

        Debris in ``new`` takes room too but is gone before anything is written.
        """
        found, others = [], []
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(self._entries) as entries,
        ):
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # dropped by another process
                    info, path = entry.stat(follow_symlinks=False), Path(entry.path)
                    if stat.S_ISREG(info.st_mode):
                        found.append(_File(path, _on_disk(info.st_size), info.st_mtime_ns))
                    else:
                        others.append(path)
        return found, others

    def _allowed(self, files: Sequence[_File]) -> int:
        """The limit as the disk is now."""
        existing = self.folder
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        free = shutil.disk_usage(existing).free + sum(file.size for file in files)
        return min(self._limit, free // FREE_DISK_SHARE)

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_owner()
        mode = stat.S_IMODE(self.folder.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            self.folder.chmod(mode & 0o700)

    def _check_owner(self) -> None:
        """Nobody else's entries are read, also where others may write beside the folder."""
        if hasattr(os, "geteuid") and self.folder.stat().st_uid != os.geteuid():
            raise PermissionError(f"{self.folder}: belongs to another user")

    @contextlib.contextmanager
    def _locked(self, seconds: float) -> Iterator[None]:
        """The only writer, with nothing left of killed ones; waits so long for others.

        Raises:
            TimeoutError: another process kept the lock.
        """
        from filelock import FileLock

        # On a disk that has no locks, filelock makes do with the file, and says so.
        warnings.filterwarnings("ignore", "flock not supported", UserWarning)
        path = self.folder / "lock"
        try:
            lock = FileLock(path, timeout=seconds, mode=0o600).acquire()
        except TimeoutError:
            raise TimeoutError(f"{path}: another process holds it") from None
        with lock:
            for folder in (self._entries, self._new):
                if not folder.is_dir():
                    _remove(folder)
                    folder.mkdir(mode=0o700)
            for path in self._new.iterdir():
                with contextlib.suppress(OSError):
                    _remove(path)
            yield


def open_regular(path: Path) -> BufferedReader:
    """To read. Another process may put anything there between two looks.

    Raises:
        OSError: it is no regular file, or cannot be opened.
    """
    descriptor = os.open(path, _READ_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("is no regular file")
    return os.fdopen(descriptor, "rb")


def _read_checked(file: BufferedReader, kind: str, key: bytes) -> UInt8 | None:
    """The payload, if header and payload are as they were written under this key."""
    header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        return None
    fields, digest = header[: _HEADER.size], header[_HEADER.size :]
    magic, version, found_kind, found_key, size, checksum = _HEADER.unpack(fields)
    if (
        digest != xxhash.xxh3_128_digest(fields)
        or (magic, version) != (_MAGIC, FORMAT_VERSION)
        or (found_kind.rstrip(b"\0"), found_key) != (kind.encode(), key)
        or os.fstat(file.fileno()).st_size != _HEADER_BYTES + size
    ):
        return None
    payload = np.empty(size, np.uint8)
    is_whole = file.readinto(payload.data) == size
    return payload if is_whole and xxhash.xxh3_128_digest(payload.data) == checksum else None


def _remove(path: Path) -> None:
    """Whatever it is, and nothing that it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
