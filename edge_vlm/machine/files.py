"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from edge_vlm.errors import EdgeVLMError
from edge_vlm.machine.folders import label


def write_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write beside ``path``, sync and rename, so that a reader finds the old file or the new one.

    A ``private`` file may be read by the user alone.

    Raises:
        EdgeVLMError: the file system refuses; ``path`` is as it was.
    """
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        try:
            with open(part, "xb", opener=_private if private else None) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        raise EdgeVLMError(f"{label(path)}: {error.strerror or error}") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
