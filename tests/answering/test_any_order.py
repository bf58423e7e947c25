"""Whatever is done with a conversation: an answer is that of the same prompt alone."""

from __future__ import annotations

import tempfile
import unicodedata
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_vlm import Cancelled, CancelToken, Progress
from tests.answering.test_turns import picture, replayed, spelled, words
from tests.conftest import examples
from tests.fake_engine import FakeEngine
from tests.toy import mrope

PICTURES = [picture(1), picture(2, 20, 20), picture(3, 30, 90)]
questions = st.sampled_from(
    ["A?", "And what is this? ", "<|image|>", "Où ça\N{COMBINING ACUTE ACCENT}?"]
)
pictures = st.lists(st.sampled_from(range(len(PICTURES))), max_size=2)
answers = st.sampled_from([None, " Yes.", "No", "  two  ", "", words(0, 1), [*words(3), 0xC3]])


class AnyOrder(RuleBasedStateMachine):
    """A chat, the messages it should hold, and a model that keeps pictures or does not."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.said: list[str] = []  # questions and answers

    @initialize(on_disk=st.booleans(), memory=st.sampled_from([0, 1 << 20]))
    def load(self, on_disk: bool, memory: int) -> None:
        root = Path(self.folder.name)
        self.fake = self.engine(root)
        cache = root / "cache" if on_disk else None
        self.model = self.fake.load(cache=cache, tile_memory=memory)
        self.chat = self.model.chat(max_tokens=6)

    def engine(self, root: Path) -> FakeEngine:
        """What answers."""
        return FakeEngine(root / "bundle")

    @rule(question=questions, shown=pictures, answer=answers)
    def ask(self, question: str, shown: list[int], answer: Any) -> None:
        if answer is not None:
            self.fake.enqueue(answer)
        found = self.chat.ask([PICTURES[number] for number in shown], question)
        self.said += [question, self.chat.messages[-1].text]
        if answer is None:
            assert found.token_ids == replayed(self.fake, self.chat, found)
        text = unicodedata.normalize("NFC", self.chat.conversation.state.text)
        assert spelled(self.fake, self.chat) == text
        assert found.prompt_tokens > found.cached_tokens >= found.restored_tokens

    @rule(question=questions, shown=pictures, steps=st.integers(0, 25))
    def ask_and_stop(self, question: str, shown: list[int], steps: int) -> None:
        cancel, left = CancelToken(), [steps]

        def stop(_: Progress) -> None:
            left[0] -= 1
            if left[0] < 0:
                cancel.set()

        try:
            self.chat.ask(
                [PICTURES[number] for number in shown], question, progress=stop, cancel=cancel
            )
        except Cancelled:
            return
        self.said += [question, self.chat.messages[-1].text]

    @rule(question=questions, n_read=st.integers(0, 3))
    def ask_and_leave(self, question: str, n_read: int) -> None:
        with self.chat.stream(question) as stream:
            n_pieces = sum(1 for _ in zip(range(n_read), stream, strict=False))
        if n_pieces < n_read:  # read to the end: of an answer of spaces, nothing is shown
            self.said += [question, self.chat.messages[-1].text]

    @rule()
    def undo(self) -> None:
        taken = [message.text for message in self.chat.undo()]
        assert taken == self.said[-2:]
        del self.said[-2:]

    @precondition(lambda self: self.said)
    @rule()
    def retry(self) -> None:
        found = self.chat.retry().result()
        self.said[-1] = self.chat.messages[-1].text
        assert found.token_ids == replayed(self.fake, self.chat, found)

    @rule(n=st.integers(1, 2))
    def drop(self, n: int) -> None:
        self.chat.drop_oldest(n)
        del self.said[: 2 * n]

    @rule()
    def restart(self) -> None:
        self.chat.restart()
        self.said = []

    @rule()
    def begin_another(self) -> None:
        self.chat.close()
        self.chat, self.said = self.model.chat(max_tokens=6), []

    @invariant()
    def holds_what_was_said(self) -> None:
        if hasattr(self, "chat"):
            assert [message.text for message in self.chat.messages] == self.said
            assert sum(context.is_open for context in self.fake.decoder.contexts) <= 1

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.chat.close()
            self.model.close()
        self.folder.cleanup()


class AnyOrderMRope(AnyOrder):
    """The same where a picture has fewer positions than rows."""

    def engine(self, root: Path) -> FakeEngine:
        """Of a family that is installed until the end."""
        self.package = ExitStack()
        self.package.enter_context(mrope.installed(root / "package"))
        return FakeEngine(root / "bundle", mrope.FAMILY, has_mrope=True)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "package"):
            self.package.close()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrderMRope = AnyOrderMRope.TestCase
TestAnyOrder.settings = TestAnyOrderMRope.settings = settings(
    max_examples=examples(25, 500),
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
