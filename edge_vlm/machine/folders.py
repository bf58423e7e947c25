"""Where files are kept: the cache, settings, what a program remembers; written whole or not."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from edge_vlm.errors import EdgeVLMError, label

APP = "edge-vlm"
CACHE_OFF = ("", "off")
WINDOWS_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$)", re.IGNORECASE)


def platform_folder(kind: str) -> Path:
    """The platform's folder for a program's ``cache``, ``config``, ``data`` or ``state``."""
    import platformdirs

    return Path(getattr(platformdirs, f"user_{kind}_dir")(APP))


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """``EDGE_VLM_CACHE``, else the platform's folder for caches."""
    folder = environment.get("EDGE_VLM_CACHE", "")
    return platform_folder("cache") if folder.lower() in CACHE_OFF else Path(folder)


def pictures_cache(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where to cache what is computed from pictures: ``cache_folder``, or nowhere if
    ``EDGE_VLM_CACHE`` is empty or ``off``.
    """
    is_off = environment.get("EDGE_VLM_CACHE", "on").lower() in CACHE_OFF
    return None if is_off else cache_folder(environment)


def config_folder() -> Path:
    """``EDGE_VLM_CONFIG``, else the platform's folder for settings."""
    return Path(os.environ.get("EDGE_VLM_CONFIG") or platform_folder("config"))


def write_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write beside ``path``, sync and rename, so that a reader finds the old file or the new one.

    A ``private`` file may be read by the user alone.

    Raises:
        EdgeVLMError: the file system refuses; ``path`` is as it was.
    """
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        with open(part, "xb", opener=_private if private else None) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise EdgeVLMError(f"{label(path)}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it is renamed if all went well
            part.unlink()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
