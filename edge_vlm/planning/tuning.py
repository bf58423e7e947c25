"""What ``edge-vlm tune`` found for a bundle on this machine, kept in the folder for settings."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import InputError, label
from edge_vlm.machine.engine_settings import EngineSettings
from edge_vlm.machine.folders import config_folder, write_file
from edge_vlm.machine.hardware import fingerprint
from edge_vlm.planning.speeds import Speeds

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Manifest
    from edge_vlm.machine.settings import MachineSettings

FORMAT_VERSION = 1
MAX_BYTES = 1 << 16  # of a file
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuning:
    """The best settings, and how fast they were."""

    settings: EngineSettings
    speeds: Speeds
    measured_with: dict[str, str]  # versions of the engines
    date: str  # ISO 8601


def tuning_file(manifest: Manifest) -> Path:
    """Where the tuning of a bundle on this machine is kept, whether or not there is one.

    The bundle is known by its files' checksums, not by its place.
    """
    parts = [f"{name} {record.sha256}" for name, record in sorted(manifest.files.items())]
    key = hashlib.sha256("\n".join([*parts, fingerprint()]).encode()).hexdigest()[:32]
    return config_folder() / "tuning" / f"{key}.json"


def store_tuning(manifest: Manifest, tuning: Tuning) -> Path:
    """Keep a tuning instead of an earlier one.

    Raises:
        EdgeVLMError: the file system refuses; an earlier one is as it was.
    """
    path = tuning_file(manifest)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"format_version": FORMAT_VERSION, "model": manifest.model.name, **asdict(tuning)}
    write_file(path, json.dumps(data, indent=2).encode())
    return path


def load_tuning(manifest: Manifest) -> Tuning | None:
    """What was stored, if anything; a file that is not right is ignored with a warning."""
    path = tuning_file(manifest)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        _ignored(path, error.strerror or str(error))
        return None
    try:
        return _parse(json.loads(text))
    except KeyError as error:
        _ignored(path, f"{error} is missing")
    except (ValueError, TypeError, RecursionError, InputError) as error:
        _ignored(path, str(error))
    return None


def engines_for(
    manifest: Manifest, settings: MachineSettings, tuning: Tuning | None = None
) -> EngineSettings:
    """What the engines get for a bundle: what is given, else what was tuned, else defaults."""
    return settings.engine_settings(
        tuning.settings if tuning else None, precision=manifest.decoder.precision
    )


def setting_words(settings: EngineSettings) -> list[tuple[str, str]]:
    """Names and values for people."""

    def word(value: Any) -> str:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)

    return [(name.replace("_", " "), word(value)) for name, value in asdict(settings).items()]


def tuning_line(tuning: Tuning) -> str:
    """One line for people."""
    words = ", ".join(f"{name} {value}" for name, value in setting_words(tuning.settings))
    return f"{tuning.date}: {words}"


def _parse(data: Any) -> Tuning:
    if not isinstance(data, dict):
        raise TypeError("not an object")
    if data["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version {data['format_version']!r} is not {FORMAT_VERSION}")
    versions, date = data["measured_with"], data["date"]
    texts = [date, *versions, *versions.values()] if isinstance(versions, dict) else [None]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise TypeError("measured_with or date are not text")
    return Tuning(
        settings=EngineSettings(**_values(EngineSettings, data["settings"])),
        speeds=Speeds(**_values(Speeds, data["speeds"])),
        measured_with=versions,
        date=date,
    )


def _values(kind: type, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise TypeError("settings or speeds are not an object")
    return {field.name: data[field.name] for field in fields(kind)}


def _ignored(path: Path, why: str) -> None:
    _log.warning(
        "%s: ignored (%s); 'edge-vlm tune' writes it anew", label(path), " ".join(why.split())[:200]
    )
