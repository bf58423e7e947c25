"""A folder that appears complete under its final name, or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from edge_vlm.bundle.manifest import MANIFEST_NAME
from edge_vlm.errors import EdgeVLMError, InputError

SPARE_BYTES = 64 << 20  # tokenizer, manifest and what the file system itself needs


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse an output path that exists; with ``overwrite``, one that is no bundle.

    Raises:
        InputError: it is refused, or its parent folder does not exist.
    """
    if not out.name or out.name in (".", ".."):
        raise InputError(f"{out}: is no name for a new folder")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(f"{out}: already exists; --force (overwrite=True) replaces a bundle")
    if out.is_symlink() or not out.is_dir() or not (out / MANIFEST_NAME).is_file():
        raise InputError(f"{out}: is not a bundle folder, it is not overwritten")


def check_space(parent: Path, n_bytes: int) -> None:
    """Refuse to start when the file system lacks room, also without what killed processes left.

    Raises:
        InputError: it does.
    """
    _sweep(parent)
    free = shutil.disk_usage(parent).free
    needed = n_bytes + SPARE_BYTES
    if free < needed:
        raise InputError(f"{parent}: {size_text(needed)} are needed, {size_text(free)} are free")


def size_text(n_bytes: int) -> str:
    """Bytes in GB or MB, for people."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 10**9 else f"{n_bytes / 1e6:.1f} MB"


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its name when the block ends without error.

    On any exception, also Ctrl-C, the temporary folder is removed and ``out`` is as it was.

    Raises:
        InputError: ``out`` may not be written, see ``check_target``.
        EdgeVLMError: the file system failed.
    """
    check_target(out, overwrite)
    try:
        with scratch_folder(out) as partial:
            yield partial
            for path in (*sorted(partial.iterdir()), partial):
                sync(path)
            _put_in_place(partial, out, overwrite)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise EdgeVLMError(f"{where}{error.strerror or error}") from error


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` until the block ends; those that killed processes left go first.

    A lock beside it tells that its process is alive.
    """
    _sweep(out.parent)
    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(6)}"
    with _lock(partial):
        try:
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _lock(partial: Path) -> Iterator[None]:
    path = partial.with_name(f"{partial.name}.lock")
    lock = FileLock(path, timeout=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a file system knows no locks: it then uses others
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            path.unlink()


def _sweep(folder: Path) -> None:
    """Remove partial folders that no process holds, and end the change of names of such a one."""
    for lock in folder.glob(".*.partial-*.lock"):
        if found := re.fullmatch(r"\.(.+)\.partial-([0-9a-f]{12})\.lock", lock.name):
            with suppress(OSError, Timeout), _lock(lock.with_suffix("")):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                old, out = folder / f".{found[1]}.old-{found[2]}", folder / found[1]
                if os.path.lexists(out):
                    shutil.rmtree(old, ignore_errors=True)
                elif old.is_dir():
                    old.rename(out)


def sync(path: Path) -> None:
    """Make sure that a file's or folder's content is on disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(partial: Path, out: Path, overwrite: bool) -> None:
    check_target(out, overwrite)  # it may have appeared meanwhile
    if not os.path.lexists(out):
        partial.rename(out)
    else:
        old = out.parent / f".{out.name}.old-{partial.name[-12:]}"
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            with suppress(OSError):
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(out.parent)
