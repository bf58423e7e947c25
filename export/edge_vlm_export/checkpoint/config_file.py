"""A checkpoint's text and JSON files, and its settings as pydantic models.

A checkpoint is data of unknown origin: sizes are limited before anything is parsed. A model lists
the keys that the exporter knows, with the defaults of absent ones; keys that it does not name, such
as those for training, change nothing. A value that changes the computation in a way that is not
supported is none of its field's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from edge_vlm.bundle.json_text import (
    decode,
    explain,
    kind,
    parse_json,
    read_bounded,
    shorten,
    wrong,
)
from edge_vlm.errors import CheckpointError

MAX_JSON_BYTES = 4 << 20
MAX_VOCABULARY = 1 << 24
MAX_TEMPLATE_BYTES = 1 << 20

_HUB_NAME = re.compile(r"[^\W_][\w.-]*/[^\W_][\w.-]*")

On = Literal[True]
Off = Literal[False]
Size = Annotated[int, Field(ge=1, le=1 << 20)]
Layers = Annotated[int, Field(ge=1, le=1 << 10)]
TokenId = Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Theta = Annotated[float, Field(gt=0, le=1e12)]
Pair = Annotated[tuple[Size, Size], Strict(False)]  # an array is no tuple to strict validation
StopIds = Annotated[
    list[TokenId],
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    Field(min_length=1, max_length=64),
]


def _hub_name(value: Any) -> str | None:
    named = isinstance(value, str) and len(value) <= 200 and _HUB_NAME.fullmatch(value)
    return named[0] if named else None


# ``_name_or_path`` when it is a hub name; a path of the author's machine is no name.
HubName = Annotated[str | None, BeforeValidator(_hub_name)]

_Model = TypeVar("_Model", bound=BaseModel)


class Part(BaseModel):
    """One object of a settings file. ``null`` is as if a key were absent, unless that means on."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        on = {name for name, field in cls.model_fields.items() if field.default is True}
        return {key: value for key, value in data.items() if value is not None or key in on}


def agree(part: BaseModel, key: str, expected: Any, because: str) -> None:
    """For validators: a redundant value must not contradict the one that is used.

    ``key`` may lead through parts and objects; a value that is absent is fine.
    """
    value: Any = part
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    if value is not None and not _same(value, expected):
        raise wrong(key, value, f"which contradicts {because}: {shorten(expected)}")


def check_same(path: Path, key: str, value: Any, used: Any, because: str) -> None:
    """``agree`` for a value that another file contradicts.

    Raises:
        CheckpointError: it does.
    """
    if value is not None and not _same(value, used):
        raise CheckpointError(
            f"{path}: {key} is {shorten(value)}, which contradicts {because}: {shorten(used)}"
        )


def _same(value: Any, other: Any) -> bool:
    """JSON equality: 1 and 1.0 are the same number, true is not 1."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return bool(value == other)


def read_text(path: Path, max_bytes: int) -> str:
    """The UTF-8 text of a file of at most ``max_bytes``.

    Raises:
        CheckpointError: missing, unreadable, too large or not UTF-8.
    """
    return decode(read_bounded(path, max_bytes, CheckpointError), path, CheckpointError)


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: see ``read_text``; or it is no JSON object.
    """
    return parse_object(read_text(path, max_bytes), path)


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in ``text``, which came from ``path``.

    Raises:
        CheckpointError: it is no JSON object, a key appears twice, or a number is not finite.
    """
    data = parse_json(text, path, CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is {kind(data)}, expected a JSON object")
    return data


def read_part(model: type[_Model], path: Path, max_bytes: int = MAX_JSON_BYTES) -> _Model:
    """Read a settings file.

    Raises:
        CheckpointError: it is missing or malformed, or a value is missing or not supported.
    """
    text = read_text(path, max_bytes)
    data = parse_object(text, path)
    try:
        # From JSON text, so that strict mode takes arrays for tuples.
        return model.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error, data)}") from error


def parse_part(model: type[_Model], data: Any, path: Path, prefix: str = "") -> _Model:
    """Validate an object of a settings file.

    Raises:
        CheckpointError: a value is missing or not supported; the message names file, key and value.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error, data, prefix)}") from error


def is_text(value: str) -> bool:
    """Whether a string has a UTF-8 form; JSON can spell half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_chat_template(folder: Path) -> str:
    """``chat_template.jinja``, or what ``chat_template.json`` or the tokenizer's config says.

    Raises:
        CheckpointError: there is none, or it is no text of at most 1 MiB.
    """
    path = folder / "chat_template.jinja"
    template = read_text(path, MAX_TEMPLATE_BYTES) if path.exists() else None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if template is None and (folder / name).exists():
            template = _default(read_object(folder / name).get("chat_template"))
    if template is None:
        raise CheckpointError(
            f"{path}: is missing, and neither chat_template.json nor tokenizer_config.json has a"
            " chat_template"
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
    return value if isinstance(value, str) else None
