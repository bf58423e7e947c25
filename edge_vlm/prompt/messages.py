"""A conversation: messages of text and image parts, also read from OpenAI's JSON form."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_vlm.errors import PromptError

ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 1000
MAX_IMAGES = 64
MAX_PARTS = 1000  # of one message
MAX_TEXT_CHARS = 4_000_000  # far more than any context takes


@dataclass(frozen=True)
class Text:
    """Text that somebody wrote; special tokens in it are only text."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """A picture: whatever ``edge_vlm.pictures.image.open_image`` takes.

    What can be read only once is read here.
    """

    source: Any

    def __post_init__(self) -> None:
        if hasattr(self.source, "read") and not isinstance(self.source, str | os.PathLike):
            from edge_vlm.pictures.sources import read_object

            object.__setattr__(self, "source", read_object(self.source))


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    parts: tuple[Text | ImagePart, ...]

    @property
    def text(self) -> str:
        """The text parts joined by a space."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text))


def user_message(images: Sequence[Any], question: str) -> Message:
    """Pictures first, the question after them: the order the model was trained on.

    Raises:
        ImageError: one names no page or frame, or cannot be read a first time.
    """
    named: list[Any] = []
    for image in images:
        if isinstance(image, str | os.PathLike) and "#" in os.fsdecode(image):
            from edge_vlm.pictures.sources import each_part

            named += each_part(image)
        else:
            named.append(image)
    return Message("user", (*map(ImagePart, named), Text(question)))


def cropped(messages: Sequence[Message], crop: Any) -> list[Message]:
    """The same, but of every picture only a part; see ``edge_vlm.pictures.sources.parse_crop``."""
    from edge_vlm.pictures.image import Cropped

    def of(part: Text | ImagePart) -> Text | ImagePart:
        return ImagePart(Cropped(part.source, crop)) if isinstance(part, ImagePart) else part

    return [Message(one.role, tuple(map(of, one.parts))) for one in messages]


def images_of(messages: Sequence[Message]) -> list[Any]:
    """The pictures of a conversation in prompt order."""
    return [
        part.source for message in messages for part in message.parts if isinstance(part, ImagePart)
    ]


def parse_messages(data: Any, *, answered: bool = False) -> list[Message]:
    """Read a list of messages in OpenAI's form; ``answered`` ones may end with an answer.

    ``content`` is a string or a list of ``{"type": "text", "text": ...}`` and
    ``{"type": "image_url", "image_url": {"url": ...}}``; a plain ``{"type": "image", "image":
    ...}`` is taken too. A url is a path or a ``data:`` URL.
    https://platform.openai.com/docs/api-reference/chat/create

    Raises:
        PromptError: the data has another shape; the message says where.
    """
    if isinstance(data, Mapping) and "messages" in data:
        data = data["messages"]
    if not isinstance(data, Sequence) or isinstance(data, str | bytes) or not data:
        raise PromptError("messages: must be a list of at least one message")
    if len(data) > MAX_MESSAGES:
        raise PromptError(f"messages: there are {len(data)}, at most {MAX_MESSAGES} are taken")
    messages = [_message(item, f"messages[{index}]") for index, item in enumerate(data)]
    check_messages(messages, answered=answered)
    return messages


def openai_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What ``parse_messages`` reads; pictures that are not paths or URLs go in as data: URLs."""
    return [
        {"role": message.role, "content": message.text}
        if message.role != "user"
        else {"role": message.role, "content": [_openai_part(part) for part in message.parts]}
        for message in messages
    ]


def check_messages(messages: Sequence[Message], *, answered: bool = False) -> None:
    """Check what no single message shows.

    Raises:
        PromptError: too many pictures, too much text, or the last turn is the assistant's.
    """
    if not messages:
        raise PromptError("messages: must be a list of at least one message")
    if len(images_of(messages)) > MAX_IMAGES:
        raise PromptError(f"messages: more than {MAX_IMAGES} images in one conversation")
    if sum(len(message.text) for message in messages) > MAX_TEXT_CHARS:
        raise PromptError(f"messages: more than {MAX_TEXT_CHARS} characters of text")
    if messages[-1].role == "assistant" and not answered:
        raise PromptError("messages: the last one is the assistant's; there is nothing to answer")


def without_oldest(messages: Sequence[Message], n_questions: int) -> tuple[Message, ...]:
    """Messages less the oldest questions and their answers, whose pictures move on to the next."""
    kept = list(messages)
    for _ in range(n_questions):
        users = [i for i, message in enumerate(kept) if message.role == "user"]
        if not users:
            break
        first, second = users[0], users[1] if len(users) > 1 else len(kept)
        if second < len(kept):
            moved = tuple(part for part in kept[first].parts if isinstance(part, ImagePart))
            kept[second] = Message("user", (*moved, *kept[second].parts))
        del kept[first:second]
    return tuple(kept)


def _openai_part(part: Text | ImagePart) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    source = part.source
    if isinstance(source, bytes | bytearray | memoryview):
        url = f"data:image/*;base64,{base64.b64encode(source).decode()}"
    elif isinstance(source, str) and source.startswith("data:"):
        url = source
    elif isinstance(source, str | os.PathLike):
        url = os.path.abspath(os.fspath(source))
    else:
        raise PromptError("messages: a picture given as an object cannot be written to a file")
    return {"type": "image_url", "image_url": {"url": url}}


def _message(data: Any, where: str) -> Message:
    if not isinstance(data, Mapping):
        raise PromptError(f"{where}: must be an object with role and content")
    role = data.get("role")
    if role not in ROLES:
        raise PromptError(f"{where}.role: must be one of {', '.join(ROLES)}")
    content = data.get("content")
    if isinstance(content, str):
        return Message(role, (Text(content),))
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise PromptError(f"{where}.content: must be a string or a list of parts")
    if len(content) > MAX_PARTS:
        raise PromptError(
            f"{where}.content: has {len(content)} parts, at most {MAX_PARTS} are taken"
        )
    parts = tuple(_part(item, f"{where}.content[{i}]") for i, item in enumerate(content))
    if role != "user" and any(isinstance(part, ImagePart) for part in parts):
        raise PromptError(f"{where}: only a user message carries images")
    return Message(role, parts)


def _part(data: Any, where: str) -> Text | ImagePart:
    kind = data.get("type") if isinstance(data, Mapping) else None
    if kind in ("text", "input_text"):
        if not isinstance(data.get("text"), str):
            raise PromptError(f"{where}.text: must be a string")
        return Text(data["text"])
    if kind in ("image_url", "input_image"):
        url = data.get("image_url")
        if isinstance(url, Mapping):
            url = url.get("url")
        if not isinstance(url, str) or not url:
            raise PromptError(f"{where}.image_url: must be a path or a data: URL")
        return ImagePart(url)
    if kind == "image":
        if data.get("image") is None:
            raise PromptError(f"{where}.image: must be an image")
        return ImagePart(data["image"])
    raise PromptError(f"{where}.type: must be text or image_url")
