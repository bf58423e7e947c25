"""An answer that says the same over and over ends; a conversation goes on from its first time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner

from edge_vlm import Chat, EdgeVLM, PromptError
from edge_vlm.cli.options import answer_options
from tests.answering.test_turns import replayed
from tests.fake_engine import FakeEngine

SAID = "The image shows a man in a blue shirt. "
LOOP = " I see: " + SAID * 60
FIRST = "I see: " + SAID.strip()


@pytest.fixture
def model(fake: FakeEngine) -> Iterator[EdgeVLM]:
    with fake.load() as loaded:
        yield loaded


@pytest.fixture
def chat(model: EdgeVLM) -> Iterator[Chat]:
    with model.chat(max_tokens=3000) as opened:
        yield opened


def test_the_text_ends_before_the_first_repeat(fake: FakeEngine, model: EdgeVLM) -> None:
    fake.enqueue(LOOP)
    answer = model.ask((), "What?", max_tokens=3000)
    assert (answer.answer, answer.finish_reason) == (FIRST, "repetition")
    assert bytes(answer.token_ids).decode().strip() == FIRST


def test_a_stream_has_shown_repeats_and_its_answer_has_none(
    fake: FakeEngine, model: EdgeVLM
) -> None:
    fake.enqueue(LOOP)
    with model.stream((), "What?", max_tokens=3000) as stream:
        shown = "".join(stream)
    assert stream.answer.answer == FIRST
    assert LOOP.strip().startswith(shown)
    assert len(FIRST) < len(shown) < len(LOOP) * 2 / 3


def test_without_the_guard_it_goes_on(fake: FakeEngine, model: EdgeVLM) -> None:
    fake.enqueue(LOOP)
    answer = model.ask((), "What?", max_tokens=3000, loop_guard=False)
    assert (answer.answer, answer.finish_reason) == (LOOP.strip(), "stop")


def test_a_table_goes_on(fake: FakeEngine, model: EdgeVLM) -> None:
    table = "| Item | Price |\n|---|---|\n" + "| Coffee | 3.50 |\n" * 40
    fake.enqueue(table)
    answer = model.ask((), "What?", max_tokens=3000)
    assert (answer.answer, answer.finish_reason) == (table.strip(), "stop")


def test_a_form_is_not_ended(fake: FakeEngine, model: EdgeVLM) -> None:
    fake.enqueue(SAID * 60)
    answer = model.ask((), "What?", max_tokens=3000, regex=rf"({re.escape(SAID)}){{60}}")
    assert (answer.answer, answer.finish_reason) == (SAID * 60, "stop")


def test_a_conversation_goes_on_behind_what_was_kept(fake: FakeEngine, chat: Chat) -> None:
    fake.enqueue(LOOP)
    first = chat.ask("What?")
    assert [message.text for message in chat.messages][-1].strip() == FIRST
    follow_up = chat.ask("Sure?", max_tokens=12)
    assert follow_up.token_ids == replayed(fake, chat, follow_up)
    assert follow_up.cached_tokens == first.prompt_tokens + len(first.token_ids)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_what_the_option_takes(model: EdgeVLM, value: object) -> None:
    with pytest.raises(PromptError, match="loop_guard: must be True or False"):
        model.ask((), "What?", loop_guard=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "environment", "options"),
    [
        ([], {}, {}),
        (["--no-loop-guard"], {}, {"loop_guard": False}),
        ([], {"TOOL_NO_LOOP_GUARD": "1"}, {"loop_guard": False}),
    ],
)
def test_the_command_line_turns_it_off(
    arguments: list[str], environment: dict[str, str], options: dict[str, bool]
) -> None:
    given: dict[str, Any] = {}
    command = click.command(answer_options(lambda **values: given.update(values)))
    result = CliRunner().invoke(
        command, arguments, env=environment, auto_envvar_prefix="TOOL", catch_exceptions=False
    )
    assert result.exit_code == 0
    assert {name: value for name, value in given.items() if value is not None} == options
