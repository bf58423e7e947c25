"""Where files are kept: the cache, settings, what a program remembers; written whole or not."""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from edge_vlm.errors import EdgeVLMError, InputError, label, why

APP = "edge-vlm"
CACHE_OFF = ("", "off")
# What an optional file raises that is not there, or not for this user.
ABSENT = (FileNotFoundError, NotADirectoryError, PermissionError)
ABANDONED = 600  # seconds: writing a file takes no longer without changing it
WINDOWS_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$)", re.IGNORECASE)


def user_path(text: str) -> Path:
    """A path in which a leading ``~`` or ``~name`` is that user's home, as in a shell.

    Raises:
        InputError: there is no such home.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise InputError(f"{label(text)}: there is no such home folder")
    return Path(path)


def platform_folder(kind: str, variable: str = "HOME") -> Path:
    """The platform's folder for a program's ``cache``, ``config``, ``data`` or ``state``, for
    which ``variable`` can name another.

    Raises:
        InputError: the user has no home.
    """
    import platformdirs

    with suppress(RuntimeError):  # of a user without a name, if HOME does not say where
        folder = Path(getattr(platformdirs, f"user_{kind}_dir")(APP))
        if folder.is_absolute():
            return folder
    raise InputError(f"the user has no home folder for the {kind}; {variable} can name one")


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """``EDGE_VLM_CACHE``, else the platform's folder for caches.

    Raises:
        InputError: there is no home for it.
    """
    folder = environment.get("EDGE_VLM_CACHE", "")
    return (
        platform_folder("cache", "EDGE_VLM_CACHE")
        if folder.lower() in CACHE_OFF
        else user_path(folder)
    )


def pictures_cache(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where to cache what is computed from pictures: ``cache_folder``, or nowhere if
    ``EDGE_VLM_CACHE`` is empty or ``off``, or there is no home.
    """
    if environment.get("EDGE_VLM_CACHE", "on").lower() in CACHE_OFF:
        return None
    try:
        return cache_folder(environment)
    except InputError as error:
        _say_once(f"pictures are not cached: {error}")
        return None


@cache
def _say_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def config_folder() -> Path:
    """``EDGE_VLM_CONFIG``, else the platform's folder for settings.

    Raises:
        InputError: there is no home for it.
    """
    folder = os.environ.get("EDGE_VLM_CONFIG")
    return user_path(folder) if folder else platform_folder("config", "EDGE_VLM_CONFIG")


def write_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write beside ``path``, sync and rename, so that a reader finds the old file or the new one.

    A ``private`` file may be read by the user alone.

    Raises:
        EdgeVLMError: the file system refuses; ``path`` is as it was.
    """
    try:
        with new_file(path) as part:
            with open(part, "xb", opener=_private if private else None) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    except (OSError, ValueError) as error:  # a NUL in the name
        raise EdgeVLMError(f"{label(path)}: {why(error)}") from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for what takes its place when it is whole; gone afterwards.

    What a killed process left beside ``path`` is removed.
    """
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        yield part
    finally:
        for left in (part, *_left(path)):
            with suppress(OSError):
                left.unlink()


def _left(path: Path) -> Iterator[Path]:
    """Old files of ``new_file``."""
    name = re.compile(re.escape(f".{path.name[:100]}.") + r"[0-9a-f]{12}\.part")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > ABANDONED:
                yield Path(entry.path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
