"""One conversation's turns: pictures encoded, prompt prefilled, answer generated.

A conversation owns a context. Its KV cache only ever grows by what is new: a turn's own tokens and
pictures. A turn that fails or is stopped is taken back as if it had not been asked.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edge_vlm.answering.answer import Answer, Clock
from edge_vlm.answering.engine import Engine
from edge_vlm.answering.generate import Reply, generate, pick
from edge_vlm.answering.options import AskOptions
from edge_vlm.decoder.context import Context
from edge_vlm.errors import BudgetError, Cancelled, DecoderError, PromptError
from edge_vlm.families.base import ImageProcessor
from edge_vlm.forms.guide import Guide
from edge_vlm.machine.memory import peak_rss_bytes
from edge_vlm.pictures.image import load_image
from edge_vlm.pictures.picture import Crops, EncodedImage, Picture, encode_pictures, open_picture
from edge_vlm.planning.budget import budget_positions, check_budget, limit_tiles
from edge_vlm.planning.limits import tiles_within
from edge_vlm.planning.request import ModelSizes
from edge_vlm.progress import CancelToken, OnProgress, Progress
from edge_vlm.prompt.messages import (
    ImagePart,
    Message,
    Text,
    check_messages,
    images_of,
    without_oldest,
)
from edge_vlm.prompt.positions import common_prefix, identity, picture_ends, prompt_ids, rest_of

MIN_ANSWER_TOKENS = 32  # room that a request must leave for its answer


@dataclass
class _State:
    """What the conversation holds so far; replaced as a whole when a turn succeeds."""

    messages: tuple[Message, ...] = ()
    pictures: tuple[Picture, ...] = ()
    text: str = ""  # of the prompt and the answers, as rendered and generated
    ids: tuple[int, ...] = ()  # one an input position; -1 - i for picture i


class Conversation:
    """Turns with one model; use it from one thread at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._context: Context | None = None
        self._state = _State()
        self._earlier: list[_State] = []  # before each of the turns
        self._resident: tuple[int | bytes, ...] = ()  # what the KV cache holds, see ``identity``
        self._busy = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far."""
        return self._state.messages

    def turn(
        self,
        new: Sequence[Message],
        options: AskOptions,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        *,
        keep_partial: bool = False,
        after: _State | None = None,
    ) -> Iterator[str | Answer]:
        """Add messages and answer them: yields pieces of text, at last the ``Answer``.

        With ``keep_partial``, an answer that is cancelled after its first token is kept as it is,
        with "cancelled" as its finish reason. ``after`` is the state to go on from, by default the
        present one.

        Raises:
            InputError: the request is invalid or too large; nothing was computed.
            Cancelled: ``cancel`` was set.
            EdgeVLMError: an engine failed.
        """
        if self._busy:
            raise DecoderError("this conversation is already answering; finish or close that first")
        self._busy = True
        try:
            old = after or self._state
            yield from self._turn(old, new, options, progress or _ignore, cancel, keep_partial)
            if after is None:
                self._earlier.append(old)
        finally:
            self._busy = False
            if self._engine.store:
                self._engine.store.flush()

    def close(self) -> None:
        """Free the KV cache."""
        if self._context:
            self._context.close()
        self._context = None
        self._resident = ()
        self.restart()

    def restart(self, messages: Sequence[Message] = (), *, max_tiles: int | None = None) -> None:
        """Begin again, with turns that were had elsewhere; what is cached is used where it fits.

        Raises:
            InputError: one of their pictures cannot be read; nothing changed.
        """
        pictures = self._open_pictures(messages, max_tiles)
        self._state = _State(messages=tuple(messages), pictures=pictures)
        self._earlier = []

    def undo(self) -> tuple[Message, ...]:
        """Take the last turn back and return its messages; none if there was none."""
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
    ) -> Iterator[str | Answer]:
        """Answer the last question again, as ``turn``; until that is done the old answer stays.

        Raises:
            PromptError: there was none.
        """
        before = self._before_last()
        if before is None:
            raise PromptError("there is no question to answer again")
        new = [m for m in self._state.messages[len(before.messages) :] if m.role != "assistant"]
        return self.turn(new, options, progress, cancel, keep_partial=keep_partial, after=before)

    def n_to_drop(self, new: Sequence[Message], options: AskOptions) -> int | None:
        """How many of the oldest questions to drop so that ``new`` fits: as few as leave a quarter
        of the context free, else as few as will do; None if no number would.
        """
        engine, state = self._engine, self._state
        settings = engine.settings
        allowed = budget_positions(engine.manifest.decoder, settings.kv_budget, settings.kv_type)
        pictures = (*state.pictures, *self._open_pictures(new, options.max_tiles))
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
        messages = without_oldest(self._state.messages, n_questions)
        left = tuple(
            part
            for message in self._state.messages
            for part in message.parts
            if isinstance(part, ImagePart)
        )
        kept = len(images_of(messages))
        pictures = self._state.pictures if kept else ()
        self._state = _State(messages=messages, pictures=pictures)
        self._earlier = []
        return () if kept else left

    def _before_last(self) -> _State | None:
        """The state before the last turn, which may be one that was loaded."""
        if self._earlier:
            return self._earlier[-1]
        messages = self._state.messages
        users = [i for i, message in enumerate(messages) if message.role == "user"]
        if not users:
            return None
        rest = messages[: users[-1]]
        return _State(messages=rest, pictures=self._state.pictures[: len(images_of(rest))])

    def _turn(
        self,
        old: _State,
        new: Sequence[Message],
        options: AskOptions,
        progress: OnProgress,
        cancel: CancelToken | None,
        keep_partial: bool,
    ) -> Iterator[str | Answer]:
        engine = self._engine
        clock = Clock()
        messages = (*old.messages, *new)
        check_messages(messages)
        processor = limit_tiles(engine.manifest.image_processor, options.max_tiles)
        pictures = (*old.pictures, *self._open_pictures(new, options.max_tiles, options.within))
        text, ids = self._prompt(old, messages, pictures)
        held = identity(ids, pictures)
        n_kept = common_prefix(held, self._resident)
        lead = self._lead(messages, text) if options.form or options.choices else ""
        choices = {c: engine.decoder.tokenize(lead + c) for c in options.choices or ()}
        wanted = max(map(len, choices.values())) if choices else options.max_tokens
        context, max_tokens = self._make_room(len(ids), pictures, processor, wanted)
        if choices and max_tokens < wanted:
            raise BudgetError("the choices do not fit the KV-cache budget behind this prompt")
        guide = self._guide(options, lead, max_tokens)
        self._resident = held[:n_kept]  # also if this turn is stopped
        context.truncate(n_kept)  # also what a turn that was stopped has left

        if cancel:
            cancel.check()
        from_nothing = n_kept == 0
        n_restored = self._restore(context, ids, pictures, clock) if from_nothing else 0
        n_kept += n_restored
        crops = self._encode(pictures, ids[n_kept:], clock, progress, cancel)
        end = max(picture_ends(ids), default=0) if from_nothing else 0

        def keep() -> None:
            if engine.prefixes and n_kept < end <= context.n_positions:
                digests = [picture.digest for picture in pictures]
                engine.prefixes.keep(context, ids[:end], digests)

        with engine.decoder.working():
            try:
                self._prefill(context, ids, n_kept, pictures, end, clock, progress, cancel)
            except Cancelled:
                keep()
                raise
            self._resident = held
            if choices:
                pieces = pick(
                    engine.manifest,
                    context,
                    choices,
                    lead=lead,
                    clock=clock,
                    progress=progress,
                    cancel=cancel,
                )
            else:
                pieces = generate(
                    engine.decoder,
                    context,
                    options,
                    stop=engine.manifest.tokens.stop,
                    max_tokens=max_tokens,
                    guide=guide,
                    lead=lead,
                    clock=clock,
                    progress=progress,
                    cancel=cancel,
                    keep_partial=keep_partial,
                )
            reply = yield from _after_first(pieces, keep)
        is_free = guide is None and not choices
        answer = reply.text.strip() if is_free else reply.text.removeprefix(lead)
        parsed = options.form.parse(answer) if options.form else None

        self._resident = (*held, *reply.ids)[: context.n_positions]
        self._state = _State(
            messages=(*messages, Message("assistant", (Text(reply.text.removeprefix(" ")),))),
            pictures=pictures,
            text=text + reply.text,
            ids=(*ids, *reply.ids),
        )
        yield Answer(
            answer=answer,
            token_ids=reply.ids,
            finish_reason=reply.finish,
            prompt_tokens=len(ids),
            cached_tokens=n_kept,
            restored_tokens=n_restored,
            image_tokens=sum(picture.n_tokens for picture in pictures),
            images=tuple(picture.use for picture in pictures),
            encoded_crops=crops.encoded,
            cached_crops=crops.cached,
            timings=clock.timings(engine.seconds, len(ids) - n_kept, reply.n_computed),
            kv_bytes=context.kv_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            parsed=parsed,
            choices=reply.probabilities,
        )

    def _lead(self, messages: Sequence[Message], prompt: str) -> str:
        """The space that the template writes between the prompt and an answer."""
        reply = Message("assistant", (Text("x"),))
        rendered = self._engine.prompts.render([*messages, reply], generation_prompt=False).plain
        rest = rendered.removeprefix(prompt)
        return rest[: len(rest) - len(rest.lstrip())] if rest != rendered else ""

    def _guide(self, options: AskOptions, lead: str, max_tokens: int) -> Guide | None:
        form, decoder = options.form, self._engine.decoder
        if form is None:
            return None
        stop = self._engine.manifest.tokens.stop
        return Guide(decoder.vocabulary, form.languages, form.after(lead), stop, max_tokens)

    def _open_pictures(
        self, messages: Sequence[Message], max_tiles: int | None, within: float | None = None
    ) -> tuple[Picture, ...]:
        engine, settings = self._engine, self._engine.settings
        sources: Sequence[object] = images_of(messages)
        limits = [n for n in (max_tiles, settings.max_tiles) if n is not None]
        if within is not None and sources:
            limits.append(self._tiles_within(within, sources := [*map(self._read, sources)]))
        processor = limit_tiles(engine.manifest.image_processor, min(limits, default=None))
        return tuple(
            open_picture(source, processor, engine.manifest, settings, engine.tiles.model)
            for source in sources
        )

    def _read(self, source: object) -> object:
        """A picture's pixels; one that is encoded stays."""
        if isinstance(source, EncodedImage):
            return source
        settings = self._engine.settings
        return load_image(
            source, max_pixels=settings.max_pixels, extra_formats=settings.image_formats
        )

    def _tiles_within(self, seconds: float, sources: Sequence[object]) -> int:
        engine = self._engine
        sizes = [(one.shape[1], one.shape[0]) for one in sources if isinstance(one, np.ndarray)]
        return tiles_within(
            seconds,
            sizes,
            ModelSizes.of(engine.manifest),
            engine.settings,
            engine.engines,
            engine.speeds,
        )

    def _prompt(
        self, old: _State, messages: Sequence[Message], pictures: Sequence[Picture]
    ) -> tuple[str, tuple[int, ...]]:
        """Text and ids of the whole prompt.

        What was generated keeps its ids: if the conversation so far is rendered to the very text
        that is cached, only the rest is tokenized.
        """
        prompts = self._engine.prompts
        rendered = prompts.render(messages)
        text = rendered.plain
        if old.ids and text.startswith(old.text):
            spans = prompts.spans(rest_of(rendered, len(old.text)), first=False)
            return text, (*old.ids, *prompt_ids(spans, pictures, len(old.pictures)))
        return text, prompt_ids(prompts.spans(rendered, first=True), pictures, 0)

    def _make_room(
        self,
        n_prompt: int,
        pictures: Sequence[Picture],
        processor: ImageProcessor,
        wanted: int,
    ) -> tuple[Context, int]:
        """A context for the prompt and its answer, and the answer's largest length in it."""
        engine, settings = self._engine, self._engine.settings
        geometry = engine.manifest.decoder
        check_budget(
            n_prompt + min(wanted, MIN_ANSWER_TOKENS),
            [(p.use.size[1], p.use.size[0]) for p in pictures],
            processor,
            geometry,
            settings.kv_budget,
            settings.kv_type,
        )
        allowed = budget_positions(geometry, settings.kv_budget, settings.kv_type)
        max_tokens = min(wanted, allowed - n_prompt)
        if self._context is None:
            self._context = engine.decoder.context(n_prompt + max_tokens)
        else:
            self._context.reserve(n_prompt + max_tokens)
        return self._context, max_tokens

    def _restore(
        self, context: Context, ids: Sequence[int], pictures: Sequence[Picture], clock: Clock
    ) -> int:
        """Positions put into the empty context from disk."""
        if self._engine.prefixes is None:
            return 0
        started = time.perf_counter()
        n = self._engine.prefixes.restore(context, ids, [picture.digest for picture in pictures])
        clock.prefill += time.perf_counter() - started
        return n

    def _encode(
        self,
        pictures: Sequence[Picture],
        ids: Sequence[int],
        clock: Clock,
        progress: OnProgress,
        cancel: CancelToken | None,
    ) -> Crops:
        """Encode the pictures that are prefilled now and were not encoded before."""
        engine = self._engine
        wanted = {-1 - value for value in ids if value < 0}
        waiting = [picture for i, picture in enumerate(pictures) if i in wanted]
        loaded = engine.vision.load_seconds
        try:
            crops = encode_pictures(waiting, engine.tiles, progress, cancel)
        finally:
            if engine.in_turns:
                engine.vision.release()
            else:
                engine.vision.rest()
        clock.vision = crops.seconds - (engine.vision.load_seconds - loaded)
        return crops

    def _prefill(
        self,
        context: Context,
        ids: Sequence[int],
        n_kept: int,
        pictures: Sequence[Picture],
        settle_at: int,
        clock: Clock,
        progress: OnProgress,
        cancel: CancelToken | None,
    ) -> None:
        """Put positions ``n_kept`` and after into the KV cache; logits for the last one.

        What follows position ``settle_at`` is computed as behind a prefix from disk.
        """
        started, loaded = time.perf_counter(), self._engine.decoder.load_seconds
        position, end = n_kept, len(ids)
        progress(Progress("prefill", 0, end - n_kept))
        while position < end:
            stop = position + 1
            while stop < end and (
                ids[stop] == ids[position] if ids[position] < 0 else ids[stop] >= 0
            ):
                stop += 1

            def report(n_done: int, before: int = position - n_kept) -> None:
                progress(Progress("prefill", before + n_done, end - n_kept))

            last = stop == end
            if ids[position] >= 0:
                context.append_tokens(
                    ids[position:stop], logits=last, cancel=cancel, progress=report
                )
            else:
                index = -1 - ids[position]
                first = ids.index(ids[position])
                rows = pictures[index].rows
                if rows is None:
                    raise DecoderError("a picture was not encoded")
                context.append_embeddings(
                    rows[position - first : stop - first],
                    logits=last,
                    cancel=cancel,
                    progress=report,
                )
            position = stop
            if position == settle_at:
                context.settle()
        clock.prefill += time.perf_counter() - started
        clock.prefill -= self._engine.decoder.load_seconds - loaded


def _after_first(
    pieces: Generator[str, None, Reply], then: Callable[[], None]
) -> Generator[str, None, Reply]:
    """The same pieces; ``then`` is called once, when the first was taken or there will be none.

    Copying a KV cache takes a moment, which nobody has to wait for in front of an answer.
    """
    is_first = True
    with contextlib.closing(pieces):
        try:
            while True:
                yield next(pieces)
                if is_first:
                    is_first = False
                    then()
        except StopIteration as end:
            if is_first:
                then()
            reply: Reply = end.value
            return reply
        except (Cancelled, GeneratorExit):
            if is_first:
                then()
            raise


def _ignore(_: Progress) -> None:
    pass
