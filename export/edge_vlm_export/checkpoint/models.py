"""Settings files as pydantic models: what is not supported is refused by its name.

A model lists the keys that the exporter knows, with the defaults of absent ones. ``null`` is as if
a key were absent. A value that changes the computation in a way that is not supported is none of
its field's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_vlm.errors import CheckpointError
from edge_vlm_export.checkpoint.json_file import MAX_JSON_BYTES, read_json, shorten

Size = Annotated[int, Field(ge=1, le=1 << 20)]
Layers = Annotated[int, Field(ge=1, le=1 << 10)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 24)]
Epsilon = Annotated[float, Field(gt=0, le=1)]

_Model = TypeVar("_Model", bound="Part")


class Part(BaseModel):
    """One object of a settings file; keys that it does not name change nothing."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


def read_part(kind: type[_Model], path: Path, max_bytes: int = MAX_JSON_BYTES) -> _Model:
    """Read a settings file.

    Raises:
        CheckpointError: it is missing or malformed, or a value is missing or not supported.
    """
    return parse_part(kind, read_json(path, max_bytes).data, path)


def parse_part(kind: type[_Model], data: Any, path: Path, prefix: str = "") -> _Model:
    """Validate an object of a settings file.

    Raises:
        CheckpointError: a value is missing or not supported; the message names file, key and value.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = prefix + ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {_problem(key, first)}") from error


def _problem(key: str, error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{key} is missing"
    if kind == "literal_error":
        expected = context["expected"]
        return f"{key} is {shorten(error['input'])}, which is not supported: it must be {expected}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key} is {shorten(error['input'])}, {message[0].lower()}{message[1:]}"
