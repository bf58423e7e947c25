"""Settings that every family's checkpoints have, in the files where versions put them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from edge_vlm.bundle.json_text import shorten
from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.config_file import (
    Part,
    StopIds,
    TokenId,
    is_text,
    read_object,
    read_part,
    read_text,
)

MAX_TEMPLATE_BYTES = 1 << 20
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
IMAGES, GENERATION, PROCESSOR = (
    f"{name}.json" for name in ("preprocessor_config", "generation_config", "processor_config")
)
# What a download takes where it is there.
SETTINGS_FILES = (IMAGES, GENERATION, TEMPLATE, "chat_template.json")
# Keys of any image processor or processor that change no picture.
IMAGE_KEYS = (
    *("crop_size", "data_format", "default_to_square", "device", "disable_grouping"),
    *("image_seq_length", "input_data_format", "pad_size", "return_tensors"),
)
PROCESSOR_KEYS = (
    *("audio_processor", "chat_template", "feature_extractor", "image_processor"),
    *("tokenizer", "video_processor"),
)

_Model = TypeVar("_Model", bound=BaseModel)


class Generation(Part):
    """``generation_config.json``; how tokens are chosen is no matter of a bundle."""

    eos_token_id: StopIds | None = None
    bos_token_id: TokenId | None = None


def read_images(model: type[_Model], folder: Path) -> tuple[_Model, Path]:
    """The image processor's settings, and the file that has them.

    That is ``preprocessor_config.json`` or, since transformers 5, ``processor_config.json``.

    Raises:
        CheckpointError: there are none, they cannot be read, or both files have other ones.
    """
    path, newer = folder / IMAGES, folder / PROCESSOR
    if not newer.exists() or read_object(newer).get("image_processor") is None:
        return read_part(model, path), path
    found = read_part(model, newer, inside="image_processor")
    if path.exists() and _values(read_part(model, path)) != _values(found):
        raise CheckpointError(
            f"{path}: contradicts image_processor in {newer.name}; remove the one that is not meant"
        )
    return found, newer


def _values(part: BaseModel) -> dict[str, Any]:
    return part.model_dump(exclude={"image_processor_type"})  # a faster one computes the same


def read_generation(folder: Path) -> Generation:
    """``generation_config.json``; fine-tuned models often lack it."""
    path = folder / GENERATION
    return read_part(Generation, path) if path.exists() else Generation()


def read_stop_ids(folder: Path, n_ids: int, *levels: Any) -> tuple[int, ...]:
    """The ids that end an answer, from ``generation_config.json`` or ``levels`` of config.json.

    Raises:
        CheckpointError: none tells any, or one is not among the ``n_ids`` that an answer can have.
    """
    path, told = folder / GENERATION, read_generation(folder).eos_token_id
    if told is None:
        path = folder / "config.json"
        told = next((level.eos_token_id for level in levels if level.eos_token_id), None)
    if told is None:
        raise CheckpointError(f"{path}: eos_token_id is missing, also from {GENERATION}")
    if max(told) >= n_ids:
        shown = told[0] if len(told) == 1 else told
        raise CheckpointError(
            f"{path}: eos_token_id is {shorten(shown)}, the ids of answers end at {n_ids}"
        )
    return tuple(dict.fromkeys(told))


def read_chat_template(folder: Path) -> str:
    """The default template of a folder.

    Of several the first counts: ``chat_template.jinja``, then what is called chat_template in
    ``chat_template.json``, ``processor_config.json`` and ``tokenizer_config.json``.

    Raises:
        CheckpointError: there is none, or it is no text of at most 1 MiB.
    """
    path = folder / TEMPLATE
    template = read_text(path, MAX_TEMPLATE_BYTES) if path.exists() else None
    for name in ("chat_template.json", PROCESSOR, "tokenizer_config.json"):
        if template is None and (folder / name).exists():
            template = _default(read_object(folder / name).get("chat_template"))
    if template is None:
        more = sorted(file.name for file in (folder / MORE_TEMPLATES).glob("*.jinja"))
        raise CheckpointError(
            f"{path}: is missing, and neither chat_template.json nor tokenizer_config.json has a"
            f" chat_template"
            + (f"; {MORE_TEMPLATES} has {', '.join(more[:5])}: copy the one to use" if more else "")
        )
    if not template.strip() or len(template) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{folder}: the chat template is empty or larger than 1 MiB")
    if not is_text(template) or "\0" in template:
        raise CheckpointError(f"{folder}: the chat template is not valid Unicode text")
    return template


def _default(value: object) -> str | None:
    """A template, or that of several which is named so."""
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict)]
        value = next((i.get("template") for i in named if i.get("name") == "default"), None)
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None
