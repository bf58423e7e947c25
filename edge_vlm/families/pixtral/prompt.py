"""Pixtral's parts of a manifest about tokens and the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_vlm.families.base import Prompt, Tokens
from edge_vlm.families.parts import SpecialText, TokenId


class PixtralTokens(Tokens):
    """What stands behind each row of a picture, and behind the last."""

    image_break: TokenId
    image_end: TokenId

    @property
    def unspoken(self) -> tuple[int, ...]:
        """All three."""
        return self.image, self.image_break, self.image_end


class PixtralPrompt(Prompt):
    """The template writes these around a conversation itself."""

    bos_token: SpecialText
    eos_token: SpecialText

    def template_variables(self) -> dict[str, Any]:
        """As the published code gives them."""
        return {"bos_token": self.bos_token, "eos_token": self.eos_token}

    def content(self, role: str, parts: Sequence[dict[str, str]]) -> Any:
        """A user's parts have their text twice: the released template reads it as ``content``.

        What others say it takes as text.
        """
        if role != "user":
            return " ".join(part["text"] for part in parts)
        return [
            {**part, "content": part["text"]} if part["type"] == "text" else part for part in parts
        ]
