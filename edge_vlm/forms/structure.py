"""What an answer must be: JSON of a schema, one of some choices, a match of a pattern."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from edge_vlm.errors import DecoderError, PromptError
from edge_vlm.forms.json_schema import schema_language
from edge_vlm.forms.languages import Languages
from edge_vlm.forms.regex import RegexCompiler

MAX_CHOICES = 1000
MAX_CHOICE_CHARS = 1000


class Form:
    """A form that answers have, and how a text of that form is read."""

    def __init__(
        self,
        languages: Languages,
        language: int,
        parse: Callable[[str], Any] | None = None,
    ) -> None:
        self.languages = languages
        self._language = language
        self._parse = parse

    def after(self, lead: str) -> int:
        """The expression of an answer that begins with ``lead``."""
        with self.languages.lock:
            parts = [self.languages.literal(lead.encode()), self._language]
            return self.languages.sequence(parts)

    def parse(self, text: str) -> Any:
        """The value that a text of this form stands for; None for a form without values.

        Raises:
            DecoderError: a validator of the caller's refuses it.
        """
        return self._parse(text) if self._parse else None


def form_of(schema: Any, regex: str | None) -> Form | None:
    """The form that a call asks for.

    Raises:
        PromptError: it is not valid, not covered or too large.
    """
    if schema is not None:
        if isinstance(schema, Mapping | bool):
            return Form(*_schema(_canonical(schema)), json.loads)
        if isinstance(schema, str | bytes | int | float | Sequence):
            raise PromptError("schema: must be an object, true or false")
        return _typed_form(schema)
    if regex is not None:
        if not isinstance(regex, str):
            raise PromptError("regex: must be a string")
        return Form(*_regex(regex))
    return None


def check_choices(choices: Any) -> tuple[str, ...]:
    """The choices as a tuple.

    Raises:
        PromptError: they are not at least two different texts.
    """
    if isinstance(choices, str | bytes) or not isinstance(choices, Sequence):
        raise PromptError("choices: must be a list of texts")
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise PromptError(f"choices: must be from 2 to {MAX_CHOICES}, not {len(choices)}")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip() or choice != choice.strip():
            raise PromptError(f"choices: {choice!r} is not a text without space around it")
        if len(choice) > MAX_CHOICE_CHARS or any("\ud800" <= c <= "\udfff" for c in choice):
            raise PromptError(f"choices: {choice[:20]!r}... is too long or not valid Unicode")
    if len(set(choices)) < len(choices):
        raise PromptError("choices: one is there twice")
    return tuple(choices)


def _typed_form(wanted: Any) -> Form:
    """The form of a pydantic model, or of any other type that pydantic describes."""
    import pydantic

    try:
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(wanted)
        schema = adapter.json_schema()
    except pydantic.errors.PydanticUserError as error:
        line = str(error).splitlines()[0]
        raise PromptError(f"schema: pydantic finds no JSON Schema for it ({line})") from error
    name = getattr(wanted, "__name__", "the schema")

    def parse(text: str) -> Any:
        try:
            return adapter.validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DecoderError(
                f"{name} refuses the answer {text[:200]}: {where}: {first['msg']}"
            ) from error

    return Form(*_schema(_canonical(schema)), parse)


def _canonical(schema: Any) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"schema: is not JSON ({error})") from error


@lru_cache(maxsize=8)
def _schema(text: str) -> tuple[Languages, int]:
    languages = Languages()
    return languages, schema_language(languages, json.loads(text))


@lru_cache(maxsize=8)
def _regex(pattern: str) -> tuple[Languages, int]:
    languages = Languages()
    try:
        return languages, RegexCompiler(languages).compile(pattern)
    except PromptError as error:
        raise PromptError(f"regex: {error}") from error
