"""Comparing a bundle's files with the SHA-256 in its manifest.

Hashing gigabytes takes seconds on a small machine, so a large file that was found right is
remembered in the user's cache folder with its size, times and inode, and hashed again only when
one of them changed. ``edge-vlm info --verify`` hashes everything again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.errors import BundleError, EdgeVLMError
from edge_vlm.machine.folders import cache_folder, write_file
from edge_vlm.machine.store import open_regular

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Bundle

ALWAYS_HASHED_BYTES = 64 << 20  # smaller files are hashed each time: it takes no time
_CHUNK = 1 << 20

OnBytes = Callable[[int, int], None]  # bytes done, bytes in all


def verify(
    bundle: Bundle,
    *,
    again: bool = False,
    progress: OnBytes | None = None,
    always: int = ALWAYS_HASHED_BYTES,
) -> None:
    """Check every file of a bundle against its manifest.

    Args:
        bundle: the bundle.
        again: hash also the files that are remembered as right.
        progress: called with the bytes hashed and to hash.
        always: bytes of files that are too small to be remembered.

    Raises:
        BundleError: a file differs or cannot be read.
    """
    remembered = {} if again else _read_stamps(bundle)
    waiting = {
        name: record
        for name, record in bundle.manifest.files.items()
        if record.size <= always or remembered.get(name) != _stamp(bundle.file(name), record.sha256)
    }
    total = sum(record.size for record in waiting.values())
    done = 0
    for name, record in waiting.items():
        path = bundle.file(name)

        def report(n_bytes: int, before: int = done) -> None:
            if progress:
                progress(before + n_bytes, total)

        if sha256_of(path, report) != record.sha256:
            raise BundleError(
                f"{path}: its SHA-256 differs from the manifest; copy or export the bundle again"
            )
        done += record.size
    if any(record.size > always for record in waiting.values()):
        _write_stamps(bundle)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Lower-case hex SHA-256 of a file; ``progress`` gets the bytes read so far.

    Raises:
        BundleError: the file cannot be read.
    """
    digest = hashlib.sha256()
    done = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(done)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}") from error
    return digest.hexdigest()


def _stamp(path: Path, sha256: str) -> list[str | int]:
    info = path.stat()
    return [sha256, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]


def _stamp_file(bundle: Bundle) -> Path:
    key = hashlib.sha256(os.fsencode(bundle.path.resolve())).hexdigest()
    return cache_folder() / "verified" / f"{key}.json"


def _read_stamps(bundle: Bundle) -> dict[str, list[str | int]]:
    try:
        with open_regular(_stamp_file(bundle)) as file:
            data = json.loads(file.read())
    except (OSError, ValueError, RecursionError, EdgeVLMError):
        return {}
    return data if isinstance(data, dict) else {}


def _write_stamps(bundle: Bundle) -> None:
    stamps = {
        name: _stamp(bundle.file(name), record.sha256)
        for name, record in bundle.manifest.files.items()
    }
    # Only a shortcut for the next time: a full or read-only disk must not fail an answer.
    with contextlib.suppress(OSError, EdgeVLMError):
        path = _stamp_file(bundle)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, json.dumps(stamps).encode(), private=True)
