"""One conversation: turns that add to it, are taken back, asked again or dropped.

A conversation owns a context. Its KV cache only ever grows by what is new: a turn's own tokens and
pictures. A turn that fails or is stopped is taken back as if it had not been asked.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_vlm.answering.turn import MIN_ANSWER_TOKENS, Cache, Engine, State, Turn
from edge_vlm.errors import DecoderError, PromptError
from edge_vlm.families.base import family_of
from edge_vlm.machine.process import check_fork
from edge_vlm.pictures.image import Opened, open_image
from edge_vlm.pictures.picture import EncodedImage, Picture, open_picture, seen_among
from edge_vlm.planning.budget import budget_positions, limit_tiles
from edge_vlm.planning.limits import tiles_within
from edge_vlm.planning.request import ModelSizes
from edge_vlm.progress import CancelToken, Life
from edge_vlm.prompt.builder import prompt_ids
from edge_vlm.prompt.messages import ImagePart, Message, images_of, without_oldest

if TYPE_CHECKING:
    from edge_vlm.answering.answer import Answer, AskOptions
    from edge_vlm.engines import Context
    from edge_vlm.progress import OnProgress, Progress

_log = logging.getLogger(__name__)


class Steps:
    """What a turn yields, step by step. Any thread may close it."""

    def __init__(self, steps: Generator[str | Answer, None, None], life: Life) -> None:
        self._steps = steps
        self._life = life
        self._alone = threading.Lock()

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> str | Answer:
        check_fork()
        if not self._alone.acquire(blocking=False):
            raise DecoderError("another thread is reading this stream")
        try:
            with self._life.call():
                event = next(self._steps, None)
        finally:
            self._alone.release()
        if event is None:
            raise StopIteration
        return event

    def close(self) -> None:
        """Stop here, or where a thread is that reads it."""
        self._life.close()

    def __del__(self) -> None:
        self.close()


class Conversation:
    """Turns with one model, one at a time. Any thread may close it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cache = Cache()
        self._state = State()
        self._earlier: list[State] = []  # before each of the turns
        self._turn = threading.Lock()  # held while there is one
        self._life = Life("the chat", self._cache.close, engine.life)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far.

        Raises:
            DecoderError: it was closed.
        """
        self._life.check()
        return self._state.messages

    @property
    def state(self) -> State:
        """What it holds: messages, pictures, and ids of all cells."""
        return self._state

    @property
    def context(self) -> Context | None:
        """The KV cache; None before the first turn."""
        return self._cache.context

    def turn(
        self,
        new: Sequence[Message],
        options: AskOptions,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        *,
        keep_partial: bool = False,
        after: State | None = None,
    ) -> Steps:
        """Add messages and answer them: yields pieces of text, at last the ``Answer``.

        With ``keep_partial``, an answer that is cancelled after its first token is kept as it is,
        with "cancelled" as its finish reason. ``after`` is the state to go on from, by default the
        present one.

        Raises:
            InputError: the request is invalid or too large; nothing was computed.
            Cancelled: ``cancel`` was set.
            EdgeVLMError: an engine failed, or something was closed.
        """
        engine, stop = self._engine, CancelToken()
        turn = Turn(
            engine, self._cache, options, progress or _ignore, stop, keep_partial=keep_partial
        )

        def steps() -> Generator[str | Answer, None, None]:
            with self._one_turn(), stop.following(cancel):
                old = after or self._state
                try:
                    pictures = self._pictures(old, new, options.max_tiles, options.within)
                    self._state = yield from turn.run(old, new, pictures)
                    if after is None:
                        self._earlier.append(old)
                finally:
                    if engine.store:
                        engine.store.flush()

        generator = steps()
        return Steps(generator, Life("the stream", generator.close, self._life, stop))

    def close(self) -> None:
        """Stop its turn and free the KV cache; every use is refused from now on."""
        self._life.close()

    def restart(self, messages: Sequence[Message] = (), *, max_tiles: int | None = None) -> None:
        """Begin again, with turns that were had elsewhere; what is cached is used where it fits.

        Raises:
            InputError: one of their pictures cannot be read; nothing changed.
        """
        with self._alone():
            pictures = self._pictures(State(), messages, max_tiles)
            self._state = State(messages=tuple(messages), pictures=pictures)
            self._earlier = []

    def undo(self) -> tuple[Message, ...]:
        """Take the last turn back and return its messages; none if there was none."""
        with self._alone():
            before = self._before_last()
            if before is None:
                return ()
            taken = self._state.messages[len(before.messages) :]
            self._state = before
            self._earlier = self._earlier[:-1]
            return taken

    def retry(
        self,
        options: AskOptions,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        *,
        keep_partial: bool = False,
    ) -> Steps:
        """Answer the last question again, as ``turn``; until that is done the old answer stays.

        Raises:
            PromptError: there was none.
        """
        with self._alone():
            before = self._before_last()
        if before is None:
            raise PromptError("there is no question to answer again")
        new = [m for m in self._state.messages[len(before.messages) :] if m.role != "assistant"]
        return self.turn(new, options, progress, cancel, keep_partial=keep_partial, after=before)

    def n_to_drop(self, new: Sequence[Message], options: AskOptions) -> int | None:
        """How many of the oldest questions to drop so that ``new`` fits: as few as leave a quarter
        of the context free, else as few as will do; None if no number would.
        """
        with self._alone():
            return self._n_to_drop(new, options)

    def _n_to_drop(self, new: Sequence[Message], options: AskOptions) -> int | None:
        engine, state, settings = self._engine, self._state, self._engine.settings
        allowed = budget_positions(engine.manifest.decoder, settings.kv_budget, settings.kv_type)
        pictures = self._pictures(state, new, options.max_tiles)
        first = None
        n_turns = sum(message.role == "user" for message in state.messages)
        for n_dropped in range(n_turns + 1):
            messages = without_oldest((*state.messages, *new), n_dropped)
            spans = engine.prompts.spans(engine.prompts.render(messages), first=True)
            n_ids = len(prompt_ids(spans, pictures, 0))
            if n_ids + MIN_ANSWER_TOKENS <= allowed:
                first = n_dropped if first is None else first
                if n_ids <= allowed * 3 // 4:
                    return n_dropped
        return first

    def drop_oldest(self, n_questions: int) -> tuple[ImagePart, ...]:
        """Forget the oldest questions and their answers; their pictures move to the next question.

        Returns the pictures where there is no next question: give them with the new one.
        """
        with self._alone():
            messages = without_oldest(self._state.messages, n_questions)
            left = tuple(
                part
                for message in self._state.messages
                for part in message.parts
                if isinstance(part, ImagePart)
            )
            kept = len(images_of(messages))
            pictures = self._state.pictures if kept else ()
            self._state = State(messages=messages, pictures=pictures)
            self._earlier = []
            return () if kept else left

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Around what reads or changes the state; errors as ``_one_turn`` and ``Life.call``."""
        with self._life.call(), self._one_turn():
            yield

    @contextlib.contextmanager
    def _one_turn(self) -> Iterator[None]:
        """Nothing else happens to the conversation meanwhile.

        Raises:
            DecoderError: another thread is at it, or a stream was not read to its end.
        """
        check_fork()
        if not self._turn.acquire(blocking=False):
            raise DecoderError("this conversation is already answering; finish or close that first")
        try:
            yield
        finally:
            self._turn.release()

    def _before_last(self) -> State | None:
        """The state before the last turn, which may be one that was loaded."""
        if self._earlier:
            return self._earlier[-1]
        messages = self._state.messages
        users = [i for i, message in enumerate(messages) if message.role == "user"]
        if not users:
            return None
        rest = messages[: users[-1]]
        return State(messages=rest, pictures=self._state.pictures[: len(images_of(rest))])

    def _pictures(
        self,
        old: State,
        new: Sequence[Message],
        max_tiles: int | None,
        within: float | None = None,
    ) -> tuple[Picture, ...]:
        """The pictures of old and new messages, in prompt order.

        Raises:
            ImageError: one cannot be read.
        """
        engine, settings = self._engine, self._engine.settings
        sources: Sequence[object] = images_of(new)
        n_pictures = len(old.pictures) + len(sources)
        limits = [n for n in (max_tiles, settings.max_tiles) if n is not None]
        if within is not None and sources:
            sources = [*map(self._read, sources)]
            limits.append(self._tiles_within(within, sources, n_pictures))
        processor = limit_tiles(engine.manifest.image_processor, min(limits, default=None))
        there = [seen_among(picture, n_pictures, engine) for picture in old.pictures]
        if any(now is not before for now, before in zip(there, old.pictures, strict=True)):
            _log.warning("with %d pictures, those that were there are looked at anew", n_pictures)
        fresh = [open_picture(source, processor, n_pictures, engine) for source in sources]
        return (*there, *fresh)

    def _read(self, source: object) -> object:
        """A picture that is opened; one that is encoded stays."""
        if isinstance(source, EncodedImage):
            return source
        return open_image(source, self._engine.settings)

    def _tiles_within(self, seconds: float, sources: Sequence[object], n_pictures: int) -> int:
        engine = self._engine
        model = ModelSizes.of(engine.manifest)
        processor = family_of(model.processor).beside(model.processor, n_pictures)
        shapes = [one.pixels.shape for one in sources if isinstance(one, Opened)]
        sizes = [(width, height) for height, width, _ in shapes]
        return tiles_within(
            seconds,
            sizes,
            replace(model, processor=processor),
            engine.settings,
            engine.engines,
            engine.speeds,
        )


def _ignore(_: Progress) -> None:
    pass
