"""The families that are installed: by name, and by what a checkpoint's ``config.json`` says.

Another package adds one with an entry point of the group ``edge_vlm_export.families`` whose object
is a ``Family``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.bundle.json_text import shorten
from edge_vlm.errors import CheckpointError
from edge_vlm.plugins import load_plugin, plugins
from edge_vlm_export.checkpoint.config_file import ADAPTER, read_object

if TYPE_CHECKING:
    from edge_vlm_export.families.base import Family

CONFIG = "config.json"
LICENCES = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md")  # they tell it
GROUP = "edge_vlm_export.families"
_BUILT_IN = {
    "jina-vlm": "edge_vlm_export.families.jina_vlm.family:FAMILY",
    "llava-1.5": "edge_vlm_export.families.llava.llava_15:FAMILY",
    "llava-next": "edge_vlm_export.families.llava.llava_next:FAMILY",
    "internvl": "edge_vlm_export.families.internvl.family:FAMILY",
    "llava-onevision": "edge_vlm_export.families.llava_onevision.family:FAMILY",
    "pixtral": "edge_vlm_export.families.pixtral.family:FAMILY",
    "qwen2.5-vl": "edge_vlm_export.families.qwen2_5_vl.family:FAMILY",
}


@cache
def families() -> dict[str, Family]:
    """Every family by its name."""
    return {name: load_plugin(value) for name, value in ({**plugins(GROUP), **_BUILT_IN}).items()}


def download_files(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files besides the weights that a checkpoint has to have and may have, by its config.json.

    Raises:
        CheckpointError: see ``family_of``.
    """
    family = family_of(folder)
    return (CONFIG, *family.required_files), (*family.optional_files, *LICENCES)


def family_of(folder: Path) -> Family:
    """The family that a checkpoint's ``config.json`` belongs to.

    Raises:
        CheckpointError: the file is missing or malformed, or the model is of no known family.
    """
    path = folder / CONFIG
    if not path.exists() and (problem := _no_model(folder)):
        raise CheckpointError(f"{folder}: {problem}")
    config = read_object(path)
    for family in families().values():
        if family.recognises(config):
            return family
    known = [f"{', '.join(f.model_types)} ({name})" for name, f in families().items()]
    raise CheckpointError(
        f"{path}: model_type is {shorten(config.get('model_type'))}, which is not supported; known"
        f" are {', '.join(sorted(known))}"
    )


def _no_model(folder: Path) -> str | None:
    """What a folder without ``config.json`` is, where its files tell."""
    if (folder / ADAPTER).exists():
        base = read_object(folder / ADAPTER).get("base_model_name_or_path")
        return f"is a LoRA adapter of {shorten(base)} and no model: export that with --adapter"
    patterns = ("checkpoint-*/config.json", "snapshots/*/config.json")  # of a trainer, of the hub
    inner = sorted(path.parent for pattern in patterns for path in folder.glob(pattern))
    return f"has no {CONFIG}, but {inner[-1]} has one: export that folder" if inner else None
