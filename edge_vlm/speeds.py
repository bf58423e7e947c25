"""How fast a machine runs a bundle: what predictions need, stored per bundle and machine."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from edge_vlm.bundle import Manifest
from edge_vlm.errors import InputError
from edge_vlm.folders import cache_folder, label
from edge_vlm.write import write_file

MAX_BYTES = 1 << 16  # of a stored file


@dataclass(frozen=True)
class Speeds:
    """Medians of short measurements, or a device profile's estimates.

    Raises:
        InputError: a value is not a positive, finite number.
    """

    load_seconds: float  # from the start of the process to a loaded model
    vision_seconds_per_tile: float  # tower and connector, one crop
    prefill_tokens_per_second: float  # of a prompt of ``prefill_tokens``
    prefill_tokens: int
    decode_tokens_per_second: float  # with ``decode_positions`` in the KV cache
    decode_positions: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise InputError(f"{name}: must be a positive number, not {value!r}")


def speeds_file(manifest: Manifest, machine: str) -> Path:
    """Where the speeds of a bundle on a machine are kept.

    Args:
        manifest: the bundle's; its files' checksums identify it, not its place.
        machine: what identifies the machine, see ``hardware.fingerprint``.
    """
    parts = [f"{name} {record.sha256}" for name, record in sorted(manifest.files.items())]
    key = hashlib.sha256("\n".join([*parts, machine]).encode()).hexdigest()[:32]
    return cache_folder() / "speeds" / f"{key}.json"


def store_speeds(path: Path, speeds: Speeds) -> None:
    """Write speeds to ``path``.

    Raises:
        EdgeVLMError: the file system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(asdict(speeds)).encode())


def stored_speeds(path: Path) -> Speeds | None:
    """Speeds stored at ``path``; None when there are none.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES)
    except OSError:
        return None
    try:
        data = json.loads(text)
        return Speeds(**{field.name: data[field.name] for field in fields(Speeds)})
    except (ValueError, KeyError, TypeError, RecursionError, InputError) as error:
        raise InputError(f"{label(path)}: is damaged ({error}); delete it") from error
