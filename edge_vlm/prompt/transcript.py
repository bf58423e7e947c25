"""Conversations in files: JSON in OpenAI's form; other JSON a user gives is read here too."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_vlm.errors import EdgeVLMError, PromptError, label
from edge_vlm.machine.folders import write_file
from edge_vlm.prompt.messages import Message, openai_messages

MAX_BYTES = 128 << 20  # pictures may be inside, as data: URLs


def write_transcript(path: Path, messages: Sequence[Message]) -> None:
    """Write a conversation; a file of that name is replaced once the new one is whole.

    It is readable by the user alone, as it holds what was said.

    Raises:
        PromptError: it cannot be written.
    """
    text = json.dumps({"messages": openai_messages(messages)}, ensure_ascii=False, indent=1)
    try:
        # A name that is not UTF-8 is an escape of JSON.
        write_file(path, f"{text}\n".encode(errors="backslashreplace"), private=True)
    except EdgeVLMError as error:
        raise PromptError(str(error)) from error


def read_json(name: str, limit: int) -> Any:
    """The content of a file of at most ``limit`` bytes; ``-`` reads stdin.

    Raises:
        PromptError: it cannot be read, is too large or not JSON.
    """
    where = label(name)
    try:
        if name == "-":
            text = sys.stdin.buffer.read(limit + 1)
        elif Path(name).is_file():
            with open(name, "rb") as file:
                if file.seek(0, 2) > limit:  # before it is in memory
                    raise PromptError(f"{where}: is larger than {limit >> 20} MiB")
                file.seek(0)
                text = file.read(limit + 1)
        else:
            raise PromptError(f"{where}: no such file")
        if len(text) > limit:
            raise PromptError(f"{where}: is larger than {limit >> 20} MiB")
        return json.loads(text)
    except OSError as error:
        raise PromptError(f"{where}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: is not valid JSON ({error})") from error
