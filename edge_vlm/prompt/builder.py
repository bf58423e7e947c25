"""From a conversation to token ids with a gap for each picture, and what is cached of them.

The chat template decides the form. Tokens are those of the whole rendered text, split only where
the *template* placed a special token: text that a user typed stays text, whatever it spells.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_vlm.errors import BundleError, PromptError
from edge_vlm.machine.store import Entry, Store, make_key
from edge_vlm.prompt.messages import ImagePart, Message
from edge_vlm.prompt.template import ChatTemplate

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Manifest
    from edge_vlm.engines import Context
    from edge_vlm.pictures.picture import Picture

Tokenize = Callable[[str], list[int]]
_KIND = "prefix"  # of entries in the store


@dataclass(frozen=True)
class TokenSpan:
    """Token ids in a row."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ImageSpan:
    """The place of picture ``index`` (in prompt order)."""

    index: int


Span = TokenSpan | ImageSpan


class PromptBuilder:
    """Renders and tokenizes conversations for one bundle.

    Args:
        manifest: the bundle's description.
        template: text of the chat template.
        tokenize: ids of plain text, no special token recognised or added.
    """

    def __init__(self, manifest: Manifest, template: str, tokenize: Tokenize) -> None:
        self._tokens = manifest.tokens
        self._prompt = manifest.prompt
        self._tokenize = tokenize
        self._template = ChatTemplate(template)
        specials = sorted(self._tokens.special, key=len, reverse=True)
        self._specials = "|".join(re.escape(text) for text in specials)
        self._special_ids = set(self._tokens.special.values())
        self._special_starts = {text[0] for text in specials}

    def build(self, messages: Sequence[Message]) -> list[Span]:
        """Spans of a whole prompt, the begin-of-sequence token first.

        Raises:
            PromptError: the template refuses the conversation.
            BundleError: the template does not place each picture once.
        """
        return self.spans(self.render(messages), first=True)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> Rendered:
        """The prompt as text; see ``Rendered`` for how user text is marked."""
        mark = _unused_character(messages)
        n_images = 0
        rendered_messages = []
        for message in messages:
            content: list[dict[str, str]] = []
            for part in message.parts:
                if isinstance(part, ImagePart):
                    n_images += 1
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": self._marked(part.text, mark)})
            rendered_messages.append(
                {"role": message.role, "content": self._prompt.content(message.role, content)}
            )
        text = self._template.render(
            messages=rendered_messages,
            add_generation_prompt=generation_prompt,
            **self._prompt.template_variables(),
        )
        rendered = Rendered(text, mark)
        placed = sum(
            match.group() == self._prompt.image_prompt_token for match in self._placed(rendered)
        )
        if placed != n_images:
            raise BundleError(f"chat template: placed {placed} image tokens for {n_images} images")
        return rendered

    def spans(self, rendered: Rendered, *, first: bool) -> list[Span]:
        """Tokenize rendered text.

        ``first`` says that it begins a prompt: the begin-of-sequence token goes in front, if any.
        """
        spans: list[Span] = []
        bos = self._tokens.bos
        ids: list[int] = [bos] if first and bos is not None else []
        n_images = 0
        position = 0
        for match in self._placed(rendered):
            ids += self._text_ids(rendered, position, match.start(), first=first)
            position = match.end()
            if match.group() == self._prompt.image_prompt_token:
                if ids:
                    spans.append(TokenSpan(tuple(ids)))
                    ids = []
                spans.append(ImageSpan(n_images))
                n_images += 1
            else:
                ids.append(self._tokens.special[match.group()])
        ids += self._text_ids(rendered, position, len(rendered.text), first=first)
        if ids:
            spans.append(TokenSpan(tuple(ids)))
        return spans

    def _placed(self, rendered: Rendered) -> Iterator[re.Match[str]]:
        """The special tokens that the template placed: none has a mark in or behind its start."""
        pattern = f"(?=.(?!{rendered.mark}))(?:{self._specials})"
        return re.compile(pattern, re.DOTALL).finditer(rendered.text)

    def _text_ids(self, rendered: Rendered, start: int, end: int, *, first: bool) -> list[int]:
        text = rendered.text[start:end].replace(rendered.mark, "")
        if self._prompt.normalizer == "NFC":
            text = unicodedata.normalize("NFC", text)
        prefix = self._prompt.text_prefix if first or start else ""  # not inside a cached text
        return self._plain_ids(prefix + text) if text else []

    def _plain_ids(self, text: str) -> list[int]:
        """Without special tokens, whatever the text spells: llama.cpp's SentencePiece joins any two
        tokens that make a third.
        """
        ids = self._tokenize(text)
        if self._special_ids.isdisjoint(ids):
            return ids
        cuts = [match.start() + 1 for match in re.finditer(f"(?={self._specials})", text)]
        parts = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [token for start, end in parts for token in self._tokenize(text[start:end])]

    def _marked(self, text: str, mark: str) -> str:
        """Break every possible special token in user text by a mark after its first character."""
        return "".join(c + mark if c in self._special_starts else c for c in text)


@dataclass(frozen=True)
class Rendered:
    """Rendered prompt text; ``mark`` stands behind each character of user text that could begin a
    special token and is taken out again before tokenization.
    """

    text: str
    mark: str

    @property
    def plain(self) -> str:
        """The text without marks."""
        return self.text.replace(self.mark, "")


def _unused_character(messages: Sequence[Message]) -> str:
    """A private-use character that no message contains."""
    used = {character for message in messages for character in message.text}
    for surrogate in used:
        if "\ud800" <= surrogate <= "\udfff":
            raise PromptError("the text contains an unpaired surrogate, which is not valid Unicode")
    return next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used)


def prompt_ids(
    spans: Sequence[Span], pictures: Sequence[Picture], n_before: int
) -> tuple[int, ...]:
    """One number a cell of the KV cache: a token id, or -1 - i where a row of picture i goes.

    The spans' own pictures are those of ``pictures`` behind the first ``n_before``.
    """
    ids: list[int] = []
    for span in spans:
        if isinstance(span, TokenSpan):
            ids += span.ids
        else:
            index = n_before + span.index
            ids += [-1 - index] * pictures[index].n_tokens
    return tuple(ids)


def rest_of(rendered: Rendered, n_plain: int) -> Rendered:
    """What follows the first ``n_plain`` characters that are not marks."""
    for index, character in enumerate(rendered.text):
        if n_plain == 0 and character != rendered.mark:
            return Rendered(rendered.text[index:], rendered.mark)
        if character != rendered.mark:
            n_plain -= 1
    return Rendered("", rendered.mark)


def identity(ids: Sequence[int], pictures: Sequence[Picture]) -> tuple[int | bytes, ...]:
    """As ``ids``, but the same for the same picture whatever its number."""
    return tuple(value if value >= 0 else pictures[-1 - value].digest for value in ids)


def common_prefix(ids: Sequence[int | bytes], cached: Sequence[int | bytes]) -> int:
    """Leading cells that are the same; at least one is left to compute logits from."""
    n = 0
    for new, old in zip(ids[:-1], cached, strict=False):
        if new != old:
            break
        n += 1
    return n


def picture_ends(ids: Sequence[int]) -> list[int]:
    """The places behind each picture."""
    return [stop for start, stop in runs_of(ids, 0) if ids[start] < 0]


def runs_of(ids: Sequence[int], start: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of tokens and of single pictures' rows, from place ``start`` on."""
    while start < len(ids):
        stop = start + 1
        while stop < len(ids) and (ids[stop] == ids[start] if ids[start] < 0 else ids[stop] >= 0):
            stop += 1
        yield start, stop
        start = stop


class PrefixCache:
    """Prefixes of prompts, each ending with a picture.

    Prompts are given as ``prompt_ids`` gives them: ids, one a cell, where -1 - i stands for picture
    i, whose content is ``digests[i]``.

    Args:
        store: where they are kept.
        identity: what a KV cache depends on besides the prompt, see ``Decoder.identity``.
    """

    def __init__(self, store: Store, identity: Mapping[str, Any]) -> None:
        self._store = store
        self._identity = dict(identity)

    def restore(self, context: Context, ids: Sequence[int], digests: Sequence[bytes]) -> int:
        """Fill an empty context with the longest prefix that is kept; returns its cells."""
        for end in reversed(picture_ends(ids)):
            if end == len(ids):
                continue  # the logits of the last position are not kept
            key = self._key(ids[:end], digests)
            state = self._store.read(_KIND, key)
            if state is None:
                continue
            if context.set_state(state) and context.n_positions == end:
                return end
            self._store.drop(_KIND, key)
            context.truncate(0)
        return 0

    def keep(self, context: Context, ids: Sequence[int], digests: Sequence[bytes]) -> None:
        """Keep the context's first cells, which are those of the prompt ``ids``."""
        state = context.state(len(ids))
        self._store.write_soon([Entry(_KIND, self._key(ids, digests), state)])

    def _key(self, ids: Sequence[int], digests: Sequence[bytes]) -> bytes:
        used = sorted({-1 - value for value in ids if value < 0})
        return make_key(
            self._identity,
            np.array(ids, np.int32).tobytes(),
            *(digests[index] for index in used),
        )
