"""``bundle.json``: identity, geometry, tokens and file hashes of a bundle."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.bundle.checksums import sha256_of
from edge_vlm.bundle.manifest import (
    FORMAT_VERSION,
    FileRecord,
    Manifest,
    ModelIdentity,
    manifest_type,
)
from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.config_file import read_text

if TYPE_CHECKING:
    from edge_vlm.bundle.report import Report
    from edge_vlm_export.families.opened import Model

UNKNOWN_LICENSE = "unknown"
WRITERS = ("edge-vlm", "gguf", "llama-cpp-python", "numpy", "onnx")
MAX_README_BYTES = 4 << 20


def model_identity(model: Model, name: str | None) -> ModelIdentity:
    """Name, licence and origin of the model.

    The name is the given one, else a hub name found in the path of a hub cache
    (``models--owner--model/snapshots/revision``) or in ``config.json``, else the folder's name.
    An adapter is named with it.
    The licence is the one that the front matter of ``README.md`` declares, else the first line of a
    ``LICENSE`` file, else "unknown": it is never guessed from the name.

    Raises:
        CheckpointError: ``README.md`` or the licence file cannot be read as text.
    """
    folder = model.folder
    cached = re.search(
        r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})$", folder.absolute().as_posix()
    )
    origin = f"{cached[1]}/{cached[2]}" if cached else model.settings.name or folder.resolve().name
    if model.adapter:
        origin = f"{origin} with adapter {model.adapter.label}"
    return ModelIdentity(
        name=name or origin[:200] or "model",
        license=_license(folder)[:200],
        source=origin[:1000],
        revision=cached[3] if cached else None,
    )


def build_manifest(
    model: Model,
    identity: ModelIdentity,
    files: dict[str, FileRecord],
    vision: str,
    decoder: str,
    report: Report | None,
) -> Manifest:
    """The manifest of a bundle; ``vision`` and ``decoder`` name the precisions."""
    family, settings, tokenizer = model.family, model.settings, model.tokenizer
    return manifest_type(family.runtime)(
        format_version=FORMAT_VERSION,
        family=family.name,
        model=identity,
        image_processor=settings.image_processor,
        vision=family.vision_sizes(settings, vision),
        decoder=model.decoder_sizes(decoder),
        tokens=family.tokens(settings, tokenizer),
        prompt=family.prompt(settings, tokenizer),
        files=files,
        created_with=versions(),
        report=report,
    )


def record_files(
    paths: Iterable[Path], read: Callable[[int], None] = lambda n_bytes: None
) -> dict[str, FileRecord]:
    """Size and SHA-256 of files, as read back from disk; ``read`` is told the bytes so far."""
    records: dict[str, FileRecord] = {}
    done = 0
    for path in paths:

        def told(n_bytes: int, before: int = done) -> None:
            read(before + n_bytes)

        digest = sha256_of(path, told)
        records[path.name] = FileRecord(size=path.stat().st_size, sha256=digest)
        done += records[path.name].size
    return records


def unhashed(paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Records of files still in the making."""
    return {path.name: FileRecord(size=path.stat().st_size, sha256="0" * 64) for path in paths}


def versions() -> dict[str, str]:
    """Versions of what writes a bundle."""
    found = {"python": platform.python_version()}
    for name in WRITERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found


def _license(folder: Path) -> str:
    readme = folder / "README.md"
    if readme.exists():
        front = re.match(r"---\r?\n(.*?)\r?\n---", read_text(readme, MAX_README_BYTES), re.DOTALL)
        fields = dict(
            line.split(":", 1) for line in (front[1] if front else "").splitlines() if ":" in line
        )
        for key in ("license", "license_name"):
            value = fields.get(key, "").strip().strip("\"'")
            if value and value != "other":
                return value
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (folder / name).exists():
            for line in read_text(folder / name, MAX_README_BYTES).splitlines():
                if line.strip(" #\t"):
                    return line.strip(" #\t")
            raise CheckpointError(f"{folder / name}: is empty")
    return UNKNOWN_LICENSE
