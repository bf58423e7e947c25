"""What ``edge-vlm tune`` found for a bundle on this machine, kept in the folder for settings."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from edge_vlm.bundle.json_text import first_problem
from edge_vlm.errors import InputError, label, why
from edge_vlm.families.parts import Printable
from edge_vlm.machine.engine_settings import EngineSettings
from edge_vlm.machine.folders import ABSENT, config_folder, write_file
from edge_vlm.machine.hardware import fingerprint
from edge_vlm.machine.store import open_regular
from edge_vlm.planning.speeds import Speeds

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Manifest
    from edge_vlm.machine.settings import MachineSettings

MAX_BYTES = 1 << 16  # of a file
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuning:
    """The best settings, and how fast they were."""

    settings: EngineSettings
    speeds: Speeds
    measured_with: dict[str, str]  # versions of the engines
    date: str  # ISO 8601


class _Stored(BaseModel):
    """A tuning on disk."""

    format_version: Literal[1]
    model: str
    settings: EngineSettings
    speeds: Speeds
    measured_with: dict[Printable, Printable]
    date: Printable


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
    stored = _Stored(format_version=1, model=manifest.model.name, **vars(tuning))
    write_file(path, stored.model_dump_json(indent=2).encode())
    return path


def load_tuning(manifest: Manifest) -> Tuning | None:
    """What was stored, if anything; a file that is not right is ignored with a warning."""
    try:
        path = tuning_file(manifest)
    except InputError:  # no home
        return None
    try:
        with open_regular(path) as file:
            stored = _Stored.model_validate_json(file.read(MAX_BYTES), strict=True)
        return Tuning(stored.settings, stored.speeds, stored.measured_with, stored.date)
    except ABSENT:
        return None
    except ValidationError as error:
        problem = first_problem(error)
    except (OSError, InputError) as error:
        problem = why(error)
    _log.warning("%s: ignored (%s); 'edge-vlm tune' writes it anew", label(path), problem[:200])
    return None


def engines_for(
    manifest: Manifest, settings: MachineSettings, tuning: Tuning | None = None
) -> EngineSettings:
    """What the engines get for a bundle: what is given, else what was tuned, else defaults."""
    return settings.engine_settings(
        tuning.settings if tuning else None, precision=manifest.decoder.precision
    )


def setting_words(settings: EngineSettings) -> dict[str, str]:
    """Names and values for people."""

    def word(value: Any) -> str:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)

    return {name.replace("_", " "): word(value) for name, value in asdict(settings).items()}


def tuning_line(tuning: Tuning) -> str:
    """One line for people."""
    words = ", ".join(f"{name} {value}" for name, value in setting_words(tuning.settings).items())
    return f"{tuning.date}: {words}"
