"""Which bundle a name means, and which one is used when none is named."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from edge_vlm.errors import BundleError, InputError, label
from edge_vlm.machine.folders import (
    ABSENT,
    WINDOWS_DEVICE,
    config_folder,
    platform_folder,
    user_path,
)

EMBEDDED = "demo"
CHOICE_NAME = "model.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def bundles_folder() -> Path:
    """``EDGE_VLM_BUNDLES``, else ``bundles`` in the platform's folder for data.

    Raises:
        InputError: there is no home for it.
    """
    folder = os.environ.get("EDGE_VLM_BUNDLES")
    return user_path(folder) if folder else platform_folder("data", "EDGE_VLM_BUNDLES") / "bundles"


def chosen_model() -> str | None:
    """What ``edge-vlm use`` chose: a name or an absolute path; None when nothing was chosen.

    Raises:
        BundleError: the file that holds the choice is damaged.
    """
    try:
        path = config_folder() / CHOICE_NAME
        if not path.is_file():
            return None
        with path.open("rb") as file:
            choice = json.loads(file.read(1 << 16))["model"]
    except (*ABSENT, InputError):  # nobody with such a home has chosen
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        anew = "'edge-vlm use NAME' writes it anew"
        raise BundleError(f"{label(path)}: cannot be read; {anew}") from error
    if not isinstance(choice, str) or not choice:
        raise BundleError(f"{label(path)}: names no model; 'edge-vlm use NAME' writes it anew")
    return choice


def embedded_bundle() -> Path:
    """The model that comes with the package."""
    package = Path(__file__).parents[1]
    installed = package / "_bundles" / EMBEDDED
    if installed.is_dir():
        return installed
    return package.parent / "models" / EMBEDDED / "bundle"  # a source checkout


def find_bundle(model: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a bundle: a path, or the name of an embedded or installed one.

    Without ``model``, that of ``EDGE_VLM_MODEL``, else the one chosen with ``edge-vlm use``, else
    the embedded one.

    Raises:
        BundleError: there is none of that name.
    """
    model = model or os.environ.get("EDGE_VLM_MODEL")
    if not model:
        choice = chosen_model() or EMBEDDED
        return Path(choice) if os.path.isabs(choice) else _named(choice)
    if not isinstance(model, str):
        return Path(model)
    if os.sep in model or (os.altsep and os.altsep in model):
        return user_path(model)
    if os.path.isdir(model):
        return Path(model)
    return _named(model)


def _named(model: str) -> Path:
    if not _is_name(model):
        raise BundleError(f"{model[:100]!r}: is not the name of a model")
    with suppress(*ABSENT, InputError):
        installed = bundles_folder() / model
        if installed.is_dir():
            return installed
    if model == EMBEDDED:
        return embedded_bundle()
    raise BundleError(
        f"{model}: no such model; give a bundle's folder or one of {', '.join(installed_names())}"
    )


def installed_names() -> list[str]:
    """Names that ``find_bundle`` knows."""
    try:
        found = {path.name for path in bundles_folder().iterdir() if path.is_dir()}
    except (OSError, InputError):  # there is no such folder, or it may not be read
        found = set()
    return sorted({EMBEDDED, *filter(_is_name, found)})


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and not WINDOWS_DEVICE.match(text)
