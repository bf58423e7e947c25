"""JSON of unknown origin: bounded before it is read, parsed strictly, wrong in one line.

``because`` is the class of the error that is raised, so that a bundle and a checkpoint each have
their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import EdgeVLMError, label, why

if TYPE_CHECKING:
    from pydantic import ValidationError

Because = type[EdgeVLMError]


def read_bounded(path: Path, max_bytes: int, because: Because) -> bytes:
    """The content of a file of at most ``max_bytes``.

    Raises:
        EdgeVLMError: it is missing, unreadable or larger.
    """
    try:
        if path.exists() and not path.is_file():
            raise because(f"{label(path)}: is not a regular file")
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise because(f"{label(path)}: is missing") from error
    except (OSError, ValueError) as error:
        raise because(f"{label(path)}: {why(error)}") from error
    if len(raw) > max_bytes:
        raise because(f"{label(path)}: is larger than {max_bytes / (1 << 20):g} MiB")
    return raw


def decode(raw: bytes, where: str | Path, because: Because) -> str:
    """UTF-8 text.

    Raises:
        EdgeVLMError: it is not.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise because(f"{where}: is not UTF-8 text ({error})") from error


def parse_json(text: str | bytes, where: str | Path, because: Because) -> Any:
    """The value that ``text`` stands for.

    Raises:
        EdgeVLMError: it is not JSON, a key appears twice, or a number is not finite.
    """
    if isinstance(text, bytes):
        text = decode(text, where, because)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise because(f"{where}: is not valid JSON ({error})") from error


def shorten(value: Any, limit: int = 80) -> str:
    """A value as one short line for an error message."""
    if isinstance(value, (dict, list)) and len(value) > limit:
        return f"{kind(value)} of {len(value)} entries"
    try:
        text = json.dumps(value, ensure_ascii=True)
    except RecursionError:
        return kind(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def kind(value: Any) -> str:
    """What a value is, for a sentence."""
    names = {dict: "an object", list: "an array", str: "a text", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else "a number")


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong with what a pydantic model was made from: field and reason."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field, message = _name(first["loc"]), _reason(first["msg"])
    return f"{field}: {message}" if field else message


def explain(error: ValidationError, data: Any, prefix: str = "") -> str:
    """The same about ``data`` with its value, and what is supported instead.

    A validator that looks at several keys names one of them with ``wrong``.
    """
    first: Any = error.errors(include_url=False)[0]
    told, context = first["type"], first.get("ctx", {})
    keys = [*first["loc"], *([context["key"]] if context.get("key") else [])]
    value = context["value"] if told == "wrong" else first["input"]
    if keys and isinstance(keys[-1], int) and told not in ("model_type", "dict_type"):
        keys.pop()  # an entry of an array says less than all of it
        value = _at(data, keys, value)
        told = "array" if told == "missing" else told
    key = prefix + _name(keys)
    message = _reason(first["msg"])
    message = message[0].lower() + message[1:]
    if told == "missing":
        return f"{key} is missing"
    if told in ("literal_error", "none_required"):
        expected = context.get("expected", "null").replace("'", '"')
        return f"{key} is {shorten(value)}, which is not supported: it must be {expected}"
    if told == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key} is {shorten(value)}, {message}" if key else f"{shorten(value)}: {message}"


def wrong(key: str, value: Any, problem: str) -> Exception:
    """What a validator raises about one of its model's keys; "key is value, problem"."""
    from pydantic_core import PydanticCustomError

    context = {"key": key, "value": value, "problem": problem}
    return PydanticCustomError("wrong", "{problem}", context)


def _name(keys: Sequence[Any]) -> str:
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)[1:]
    return name[:100] if name.isprintable() else repr(name[:100])


def _reason(message: str) -> str:
    return " ".join(message.removeprefix("Value error, ").split())[:500]


def _at(data: Any, keys: list[Any], otherwise: Any) -> Any:
    try:
        for key in keys:
            data = data[key]
    except (KeyError, IndexError, TypeError):
        return otherwise
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key appears twice")
    if any(type(value) is float and not math.isfinite(value) for value in data.values()):
        raise ValueError("a number is not finite")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
