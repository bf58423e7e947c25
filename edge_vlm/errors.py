"""The errors a caller can meet, and the exit code each ends a command with.

    EdgeVLMError                 1
    ├── InputError               2  what was given cannot be used; the message says what to change
    │   ├── ImageError              a picture
    │   ├── PromptError             a conversation, or the text in it
    │   ├── BundleError             a model bundle
    │   ├── CheckpointError         a checkpoint given to the exporter
    │   └── BudgetError             the request does not fit the KV-cache budget or the context
    ├── VisionError              1  onnxruntime failed
    ├── DecoderError             1  llama.cpp failed
    └── Cancelled              130  stopped on request, between two tiles, batches or tokens

Exceptions of onnxruntime, Pillow, pydantic and the operating system are converted where the
library is called; the original stays attached as ``__cause__``.
"""

from __future__ import annotations

import os
import re

# All but tab and newline, also as bytes of names that are not UTF-8.
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\udc80-\udc9f"
_CONTROL = re.compile(f"[{_CONTROLS}]")
_CONTROL_OR_BIDI = re.compile(f"[{_CONTROLS}\u202a-\u202e\u2066-\u2069]")


class EdgeVLMError(Exception):
    """Base of every error raised on purpose; its text is one line for the user."""

    exit_code = 1


class InputError(EdgeVLMError):
    """Something the caller gave cannot be used."""

    exit_code = 2


class ImageError(InputError):
    """A picture is missing, broken, too large or of a kind that is not read."""


class PromptError(InputError):
    """A conversation or an option of the request makes no valid prompt."""


class BundleError(InputError):
    """A bundle is missing, damaged, malicious or of a newer format."""


class CheckpointError(InputError):
    """A checkpoint is incomplete, contradicts its config or needs something unsupported."""


class BudgetError(InputError):
    """The request needs more KV cache than the budget allows."""


class VisionError(EdgeVLMError):
    """The vision tower could not be loaded or run."""


class DecoderError(EdgeVLMError):
    """The decoder could not be loaded or run."""


class Cancelled(EdgeVLMError):  # noqa: N818 - named for the event, as concurrent.futures does
    """The caller asked to stop."""

    exit_code = 130


def label(path: str | os.PathLike[str]) -> str:
    """A path for a message of one line."""
    name = os.fspath(path)
    name = name if len(name) <= 300 else f"{name[:300]}..."
    return name if name.isprintable() else repr(name)


def why(error: Exception) -> str:
    """The reason that an error of the file system gives, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def harmless(text: str, *, bidi: bool = True) -> str:
    """Text in which control characters are written as escapes, so that none drives a terminal.

    Newlines and tabs stay. With ``bidi`` what turns the direction of text is escaped too.
    """
    pattern = _CONTROL_OR_BIDI if bidi else _CONTROL
    return pattern.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
