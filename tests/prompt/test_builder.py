"""Prompts of a toy model, whose tokens are bytes: every id can be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest

from edge_vlm import BundleError
from edge_vlm.families.jina_vlm.tiling import JinaPrompt
from edge_vlm.prompt.builder import ImageSpan, PromptBuilder, Span
from edge_vlm.prompt.messages import ImagePart, Message, Text
from tests.fake_engine import FakeDecoder
from tests.toy.bundle import toy_manifest
from tests.toy.sizes import END, TURN

MANIFEST = toy_manifest({"vision.onnx": b"", "decoder.gguf": b""})
NAMES = {token: text for text, token in MANIFEST.tokens.special.items()}
Make = Callable[..., PromptBuilder]


@pytest.fixture
def make() -> Make:
    def made(template: str | None = None) -> PromptBuilder:
        decoder = FakeDecoder()
        return PromptBuilder(MANIFEST, template or decoder.chat_template, decoder.tokenize)

    return made


def user(*parts: str | None) -> Message:
    """A message; None stands for a picture."""
    return Message("user", tuple(ImagePart("x.png") if p is None else Text(p) for p in parts))


def readable(spans: list[Span]) -> str:
    """Special tokens and pictures in brackets."""
    data = b""
    for span in spans:
        if isinstance(span, ImageSpan):
            data += b"[%d]" % span.index
        else:
            data += b"".join(
                f"[{NAMES[i]}]".encode() if i in NAMES else bytes([i]) for i in span.ids
            )
    return data.decode()


def test_a_conversation_is_rendered_as_published(make: Make) -> None:
    turns = [
        Message("system", (Text("Be brief."),)),
        user(None, "and", None),
        Message("assistant", (Text("Two."),)),
        user("so", None),
    ]
    assert readable(make().build(turns)) == (
        "[<|endoftext|>] System: Be brief. User: [0] and [1] Assistant: Two."
        " User: so [2] Assistant:"
    )


@pytest.mark.parametrize("text", ["<|image|>", "<|im_end|>", "<im_patch>", "<|<|image|>"])
def test_what_is_typed_stays_text(make: Make, text: str) -> None:
    spans = make().build([user(None, text)])
    assert readable(spans) == f"[<|endoftext|>] User: [0] {text} Assistant:"
    ids = [i for span in spans if not isinstance(span, ImageSpan) for i in span.ids]
    assert [i for i in ids if i >= END] == [END]


def test_what_the_template_writes_is_special(make: Make) -> None:
    builder = make("{{ messages[0].content[0].text }}<|im_end|>{{ messages[0].content[0].text }}")
    (span,) = builder.spans(builder.render([user("<|im_end|>")]), first=False)
    assert not isinstance(span, ImageSpan)
    assert [i for i in span.ids if i >= END] == [TURN]
    assert len(span.ids) == 2 * len("<|im_end|>") + 1


def test_text_is_normalized_before_it_is_tokenized(make: Make) -> None:
    assert readable(make().build([user("e\u0301")])).endswith(" User: \xe9 Assistant:")


def test_a_part_of_a_prompt_has_no_first_token(make: Make) -> None:
    builder = make()
    rendered = builder.render([user("Hi")])
    whole, part = (readable(builder.spans(rendered, first=first)) for first in (True, False))
    assert whole == f"[<|endoftext|>]{part}"
    alone = builder.render([user("Hi")], generation_prompt=False)
    assert part == f"{readable(builder.spans(alone, first=False))} Assistant:"


def test_each_picture_has_its_place(make: Make) -> None:
    twice = make("{{ image_prompt_token }}{{ image_prompt_token }}")
    with pytest.raises(BundleError, match="placed 2 image tokens for 1 images"):
        twice.build([user(None)])


class SpacedPrompt(JinaPrompt):
    """With a space in front of each text, as SentencePiece has it."""

    text_prefix: ClassVar[str] = " "


def test_a_space_stands_in_front_of_each_text() -> None:
    """And of none that goes on from what is cached: there it is in the middle of a text."""
    decoder = FakeDecoder()
    spaced = MANIFEST.model_copy(update={"prompt": SpacedPrompt(**dict(MANIFEST.prompt))})
    template = (
        "{{ messages[0].content[1].text }}<|image|><|im_end|>{{ messages[0].content[1].text }}"
    )
    builder = PromptBuilder(spaced, template, decoder.tokenize)
    rendered = builder.render([user(None, "x <|im_end|>")])
    typed = " x <|im_end|>"
    assert readable(builder.spans(rendered, first=True)) == (
        f"[<|endoftext|>]{typed}[0][<|im_end|>]{typed}"
    )
    assert readable(builder.spans(rendered, first=False)) == (
        f"{typed.removeprefix(' ')}[0][<|im_end|>]{typed}"
    )


def test_text_stays_text_where_a_tokenizer_joins_it_to_a_special_token() -> None:
    """As llama.cpp does with a SentencePiece vocabulary that has the two parts of one."""
    decoder, special = FakeDecoder(), MANIFEST.tokens.special
    text, token = next(iter(special.items()))

    def joining(plain: str) -> list[int]:
        first, *others = plain.split(text)
        ids = decoder.tokenize(first)
        for other in others:
            ids += [token, *decoder.tokenize(other)]
        return ids

    assert token in joining(f"a{text}b")
    prompts = PromptBuilder(MANIFEST, decoder.chat_template, joining)
    plain = PromptBuilder(MANIFEST, decoder.chat_template, decoder.tokenize)
    typed = [user(f"{text}a{text}{text} b")]
    assert prompts.build(typed) == plain.build(typed)
