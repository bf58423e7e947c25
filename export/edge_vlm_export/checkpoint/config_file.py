"""A checkpoint's text and JSON files, and its settings as pydantic models.

A checkpoint is data of unknown origin: sizes are limited before anything is parsed. A model lists
the keys that the exporter knows, with the defaults of absent ones; for others see ``known_keys``.
A value that changes the computation in a way that is not supported is none of its field's.
"""

from __future__ import annotations

import json
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

ADAPTER = "adapter_config.json"  # of a folder that PEFT wrote
MAX_JSON_BYTES = 4 << 20
MAX_VOCABULARY = 1 << 24

_ERROR_KEYS = frozenset(
    [
        "code",
        "detail",
        "details",
        "documentation_url",
        "error",
        "error_description",
        "errors",
        "message",
        "path",
        "status",
        "statusCode",
        "success",
        "timestamp",
    ]
)
_STAND_INS = (
    (
        rb"version https://git-lfs",
        "is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder",
    ),
    (
        rb"\s*<(!doctype|html|head|\?xml)",
        "is a web page, as a proxy or a login answers, not the file: download it again",
    ),
    (
        rb"\0{64}",
        "begins with zeros: its download or copy was not finished; download it again",
    ),
)
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download", ".tmp")
_HUB_NAME = re.compile(r"[^\W_][\w.-]*/[^\W_][\w.-]*")

On = Literal[True]
Off = Literal[False]
Size = Annotated[int, Field(ge=1, le=1 << 20)]
Layers = Annotated[int, Field(ge=1, le=1 << 10)]
TokenId = Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
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
    def _prepared(cls, data: Any) -> Any:
        return cls.prepared(data) if isinstance(data, dict) else data

    @classmethod
    def prepared(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The object without what is as if it were absent."""
        on = {name for name, field in cls.model_fields.items() if field.default is True}
        return {key: value for key, value in data.items() if value is not None or key in on}


def agree(part: BaseModel, key: str, expected: Any, because: str) -> None:
    """For validators: a redundant value must not contradict the one that is used.

    ``key`` may lead through parts and objects; a value that is absent is fine.
    """
    value: Any = part
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    if value is not None and not same(value, expected):
        raise wrong(key, value, f"which contradicts {because}: {shorten(expected)}")


def check_same(path: Path, key: str, value: Any, used: Any, because: str) -> None:
    """``agree`` for a value that another file contradicts.

    Raises:
        CheckpointError: it does.
    """
    if value is not None and not same(value, used):
        raise CheckpointError(
            f"{path}: {key} is {shorten(value)}, which contradicts {because}: {shorten(used)}"
        )


def same(value: Any, other: Any) -> bool:
    """JSON equality: 1 and 1.0 are the same number, true is not 1."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return bool(value == other)


def read_text(path: Path, max_bytes: int) -> str:
    """The UTF-8 text of a file of at most ``max_bytes``.

    Raises:
        CheckpointError: missing, unreadable, too large, not UTF-8 or not the file itself.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: {missing(path)}")
    raw = read_bounded(path, max_bytes, CheckpointError)
    check_is_itself(path, raw)
    return decode(raw, path, CheckpointError)


def check_is_itself(path: Path, head: bytes) -> None:
    """Look at a file's first bytes.

    Raises:
        CheckpointError: something else lies in its place.
    """
    for pattern, problem in _STAND_INS:
        if re.match(pattern, head.removeprefix(b"\xef\xbb\xbf"), re.IGNORECASE):
            raise CheckpointError(f"{path}: {problem}")


def missing(path: Path) -> str:
    """What is to be said of a file that is not there."""
    if path.is_symlink():
        return f"is missing: it is a link to {path.readlink()}, which is not there"
    begun = [path.name + suffix for suffix in _UNFINISHED]
    begun = [name for name in begun if (path.parent / name).exists()]
    begun += sorted(
        file.relative_to(path.parent).as_posix()
        for file in path.parent.glob(".cache/huggingface/download/*.incomplete")
    )
    return f"is missing: {begun[0]} is a download that was not finished" if begun else "is missing"


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
    if data and _ERROR_KEYS.issuperset(data):
        raise CheckpointError(
            f"{path}: is a server's error message, not the file: {shorten(data)}; download it again"
        )
    return data


def read_part(
    model: type[_Model], path: Path, max_bytes: int = MAX_JSON_BYTES, inside: str | None = None
) -> _Model:
    """Read a settings file, or what is at the key ``inside`` of it.

    Raises:
        CheckpointError: it is missing or malformed, or a value is missing or not supported.
    """
    text = read_text(path, max_bytes)
    data = parse_object(text, path)
    if inside:
        data = data[inside]
        text = json.dumps(data)
    try:
        # From JSON text, so that strict mode takes arrays for tuples.
        return model.model_validate_json(text)
    except ValidationError as error:
        prefix = f"{inside}." if inside else ""
        raise CheckpointError(f"{path}: {explain(error, data, prefix)}") from error


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
