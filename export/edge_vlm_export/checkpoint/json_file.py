"""Bounded reading of a checkpoint's text and JSON files, and typed access that names what is wrong.

A checkpoint is data of unknown origin: sizes are limited before anything is parsed, and every value
is checked for its type and range where it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_vlm.errors import CheckpointError

MAX_JSON_BYTES = 4 << 20
REQUIRED: Any = object()


def read_text(path: Path, max_bytes: int) -> str:
    """The UTF-8 text of a file of at most ``max_bytes``.

    Raises:
        CheckpointError: missing, unreadable, too large or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing from the checkpoint") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: {reason}") from error
    if len(raw) > max_bytes:
        raise CheckpointError(f"{path}: is larger than {max_bytes / (1 << 20):g} MiB")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text ({error})") from error


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Section:
    """The JSON object in a file.

    Raises:
        CheckpointError: see ``read_text``; or it is no JSON object.
    """
    return parse_json(read_text(path, max_bytes), path)


def parse_json(text: str, path: Path) -> Section:
    """The JSON object in ``text``, which came from ``path``.

    Raises:
        CheckpointError: it is no JSON object, a key appears twice, or a number is not finite.
    """
    try:
        data: Any = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is {_kind(data)}, expected a JSON object")
    return Section(data, path)


class Section:
    """One object of a JSON file, with accessors whose errors name file, key and value."""

    def __init__(self, data: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.data = data
        self.path = path
        self.prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def error(self, key: str, problem: str) -> CheckpointError:
        """An error about one key; ``problem`` continues the sentence "key is value, ..."."""
        value = shorten(self.data.get(key))
        return CheckpointError(f"{self.path}: {self.prefix}{key} is {value}, {problem}")

    def section(self, key: str) -> Section:
        """A nested object."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, dict):
            raise self.error(key, "expected an object")
        return Section(value, self.path, f"{self.prefix}{key}.")

    def integer(self, key: str, low: int, high: int, default: Any = REQUIRED) -> int:
        """An integer between ``low`` and ``high``, both included."""
        value = self._get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"expected an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """A finite number above ``low`` and up to ``high``."""
        value = self._get(key, REQUIRED)
        if type(value) not in (int, float) or not low < value <= high:
            raise self.error(key, f"expected a number above {low:g} and up to {high:g}")
        return float(value)

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, "expected true or false")
        return value

    def string(self, key: str, max_length: int, default: Any = REQUIRED) -> str:
        """A text of 1 to ``max_length`` characters."""
        value = self._get(key, default)
        if not isinstance(value, str) or not 1 <= len(value) <= max_length:
            raise self.error(key, f"expected a text of up to {max_length} characters")
        return value

    def array(self, key: str, max_length: int) -> list[Any]:
        """An array of up to ``max_length`` entries of any type."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, list) or len(value) > max_length:
            raise self.error(key, f"expected an array of up to {max_length} entries")
        return value

    def pair(self, key: str, low: int, high: int) -> tuple[int, int]:
        """Two integers between ``low`` and ``high``, both included."""
        value = self._get(key, REQUIRED)
        if (
            not isinstance(value, list)
            or len(value) != 2
            or any(type(item) is not int or not low <= item <= high for item in value)
        ):
            raise self.error(key, f"expected two integers from {low} to {high}")
        return value[0], value[1]

    def only(self, key: str, *supported: Any) -> None:
        """Refuse a value other than the supported ones; an absent key means the first of them."""
        value = self.data.get(key, supported[0])
        if not any(_same(value, other) for other in supported):
            names = " or ".join(json.dumps(other) for other in supported)
            raise self.error(key, f"which is not supported: it must be {names}")

    def agrees(self, key: str, expected: Any, because: str) -> None:
        """Refuse a redundant value that contradicts the one that is used; absent is fine."""
        value = self.data.get(key)
        if value is not None and not _same(value, expected):
            raise self.error(key, f"which contradicts {because}: {json.dumps(expected)}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            what = "is missing" if key not in self.data else "is null, a value is needed"
            raise CheckpointError(f"{self.path}: {self.prefix}{key} {what}")
        return default


def shorten(value: Any, limit: int = 80) -> str:
    """A value as one short line for an error message."""
    if isinstance(value, (dict, list)) and len(value) > limit:
        return f"{_kind(value)} of {len(value)} entries"
    try:
        text = json.dumps(value, ensure_ascii=True)
    except RecursionError:
        return _kind(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def is_text(value: str) -> bool:
    """Whether a string has a UTF-8 form; JSON can spell half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _same(value: Any, other: Any) -> bool:
    """JSON equality: 1 and 1.0 are the same number, true is not 1."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return bool(value == other)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else "a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key appears twice")
    if any(type(value) is float and not math.isfinite(value) for value in data.values()):
        raise ValueError("a number is not finite")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
