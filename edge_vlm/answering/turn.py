"""One turn: pictures encoded, the prompt prefilled, an answer generated."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edge_vlm.answering.answer import Answer, AskOptions, Clock
from edge_vlm.answering.generate import Reply, generate, pick
from edge_vlm.errors import BudgetError, Cancelled, DecoderError
from edge_vlm.families.base import family_of
from edge_vlm.machine.memory import peak_rss_bytes
from edge_vlm.pictures.picture import Crops, Picture, TileCache, encode_pictures
from edge_vlm.planning.budget import budget_positions, check_budget, limit_tiles
from edge_vlm.progress import CancelToken, Life, OnProgress, Progress
from edge_vlm.prompt.builder import (
    PrefixCache,
    PromptBuilder,
    common_prefix,
    identity,
    picture_ends,
    prompt_ids,
    rest_of,
    runs_of,
)
from edge_vlm.prompt.messages import Message, Text, check_messages

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Manifest
    from edge_vlm.engines import Context, Decoder, VisionTower
    from edge_vlm.forms.constraint import Constraint
    from edge_vlm.forms.vocabulary import Vocabulary
    from edge_vlm.machine.engine_settings import EngineSettings
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.machine.store import Store
    from edge_vlm.planning.speeds import Speeds

MIN_ANSWER_TOKENS = 32  # room that a request must leave for its answer


@dataclass(frozen=True)
class Engine:
    """The parts of a loaded model that a turn uses."""

    manifest: Manifest
    settings: MachineSettings
    prompts: PromptBuilder
    vision: VisionTower
    decoder: Decoder
    engines: EngineSettings
    speeds: Speeds | None  # as measured by edge-vlm tune
    tiles: TileCache
    prefixes: PrefixCache | None
    store: Store | None  # of both
    life: Life  # of the model
    load_seconds: float  # without what is loaded later
    in_turns: bool = False  # see RESIDENCIES

    @property
    def seconds(self) -> float:
        """All loading so far."""
        return self.load_seconds + self.vision.load_seconds + self.decoder.load_seconds

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The decoder's, as forms of answers need it."""
        from edge_vlm.forms.vocabulary import Vocabulary

        stop, decoder = self.manifest.tokens.stop, self.decoder
        return Vocabulary(decoder.pieces(), stop, decoder.tokenize)

    def rest_vision(self) -> None:
        """After pictures were encoded: memory that the decoder may need is given back."""
        if self.in_turns:
            self.vision.release()
        else:
            self.vision.rest()


@dataclass
class State:
    """What a conversation holds; replaced as a whole when a turn succeeds."""

    messages: tuple[Message, ...] = ()
    pictures: tuple[Picture, ...] = ()
    text: str = ""  # of the prompt and the answers, as rendered and generated
    ids: tuple[int, ...] = ()  # one a cell of the KV cache; -1 - i for picture i


@dataclass
class Cache:
    """A conversation's context, and what its KV cache holds."""

    context: Context | None = None
    resident: tuple[int | bytes, ...] = ()  # see ``builder.identity``

    def close(self) -> None:
        """Free the KV cache."""
        if self.context:
            self.context.close()
        self.context, self.resident = None, ()


class Turn:
    """One question and its answer.

    Args:
        engine: the loaded model.
        cache: the conversation's; after a failure it says what is still valid.
        options: of the answer.
        progress: told of every tile, batch and token.
        cancel: stops between two operators.
        keep_partial: an answer that is cancelled after its first token is kept as far as it went.
    """

    def __init__(
        self,
        engine: Engine,
        cache: Cache,
        options: AskOptions,
        progress: OnProgress,
        cancel: CancelToken,
        *,
        keep_partial: bool,
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._options = options
        self._progress = progress
        self._cancel = cancel
        self._keep_partial = keep_partial
        self._clock = Clock()

    def run(
        self, old: State, new: Sequence[Message], pictures: tuple[Picture, ...]
    ) -> Generator[str | Answer, None, State]:
        """Pieces of text, at last the ``Answer``; returns the conversation's new state.

        Args:
            old: what was said before.
            new: the messages to add.
            pictures: of all messages.

        Raises:
            InputError: the request is invalid or too large; nothing was computed.
            Cancelled: ``cancel`` was set.
            EdgeVLMError: an engine failed.
        """
        engine, options = self._engine, self._options
        messages = (*old.messages, *new)
        check_messages(messages)
        text, ids = self._prompt(old, messages, pictures)
        lead = self._lead(messages, text) if options.form or options.choices else ""
        choices = {c: engine.decoder.tokenize(lead + c) for c in options.choices or ()}
        context, max_tokens = self._make_room(len(ids), pictures, choices)
        constraint = self._constraint(lead, max_tokens)
        prompt = self._begin(context, ids, pictures)
        with engine.decoder.working():
            try:
                self._prefill(prompt)
            except Cancelled:
                self._keep(prompt)
                raise
            self._cache.resident = prompt.identity
            pieces = self._reply(context, choices, constraint, lead, max_tokens)
            reply = yield from _after_first(pieces, lambda: self._keep(prompt))
        self._cache.resident = (*prompt.identity, *reply.ids)[: context.n_positions]
        is_free = constraint is None and not choices
        yield self._answer(
            prompt, reply, reply.text.strip() if is_free else reply.text.removeprefix(lead)
        )
        return State(
            messages=(*messages, Message("assistant", (Text(reply.text.removeprefix(" ")),))),
            pictures=pictures,
            text=text + reply.text,
            ids=(*ids, *reply.ids),
        )

    def _prompt(
        self, old: State, messages: Sequence[Message], pictures: Sequence[Picture]
    ) -> tuple[str, tuple[int, ...]]:
        """Text and ids of the whole prompt.

        What was generated keeps its ids: if the conversation so far is rendered to the very text
        that is cached, and its pictures are as they were, only the rest is tokenized.
        """
        prompts = self._engine.prompts
        rendered = prompts.render(messages)
        text, n_before = rendered.plain, len(old.pictures)
        if old.ids and text.startswith(old.text) and old.pictures == tuple(pictures[:n_before]):
            spans = prompts.spans(rest_of(rendered, len(old.text)), first=False)
            return text, (*old.ids, *prompt_ids(spans, pictures, n_before))
        return text, prompt_ids(prompts.spans(rendered, first=True), pictures, 0)

    def _lead(self, messages: Sequence[Message], prompt: str) -> str:
        """The space that the template writes between the prompt and an answer."""
        reply = Message("assistant", (Text("x"),))
        rendered = self._engine.prompts.render([*messages, reply], generation_prompt=False).plain
        rest = rendered.removeprefix(prompt)
        return rest[: len(rest) - len(rest.lstrip())] if rest != rendered else ""

    def _make_room(
        self,
        n_prompt: int,
        pictures: Sequence[Picture],
        choices: Mapping[str, Sequence[int]],
    ) -> tuple[Context, int]:
        """A context for the prompt and its answer, and the answer's largest length in it."""
        engine, options, settings = self._engine, self._options, self._engine.settings
        geometry = engine.manifest.decoder
        wanted = max(map(len, choices.values())) if choices else options.max_tokens
        processor = limit_tiles(engine.manifest.image_processor, options.max_tiles)
        check_budget(
            n_prompt + min(wanted, MIN_ANSWER_TOKENS),
            [(p.use.size[1], p.use.size[0]) for p in pictures],
            family_of(processor).beside(processor, len(pictures)),
            geometry,
            settings.kv_budget,
            settings.kv_type,
        )
        allowed = budget_positions(geometry, settings.kv_budget, settings.kv_type)
        max_tokens = min(wanted, allowed - n_prompt)
        if self._cache.context is None:
            self._cache.context = engine.decoder.context(n_prompt + max_tokens)
        else:
            with engine.decoder.working():
                self._cache.context.reserve(n_prompt + max_tokens)
        if choices and max_tokens < wanted:
            raise BudgetError("the choices do not fit the KV-cache budget behind this prompt")
        return self._cache.context, max_tokens

    def _constraint(self, lead: str, max_tokens: int) -> Constraint | None:
        if self._options.form is None:
            return None
        from edge_vlm.forms.constraint import Constraint

        return Constraint(self._engine.vocabulary, self._options.form, lead, max_tokens)

    def _begin(
        self, context: Context, ids: tuple[int, ...], pictures: tuple[Picture, ...]
    ) -> _Prompt:
        """Keep what is cached of the prompt, and encode what is not."""
        held = identity(ids, pictures)
        n_kept = common_prefix(held, self._cache.resident)
        self._cache.resident = held[:n_kept]  # also if this turn is stopped
        n_restored = end = 0
        with self._engine.decoder.working():
            context.truncate(n_kept)  # also what a turn that was stopped has left
            self._cancel.check()
            n_kept = context.n_positions  # fewer, if a picture would have been cut that cannot be
            if n_kept == 0:
                n_restored = self._restore(context, ids, pictures)
                end = max(picture_ends(ids), default=0)
        n_kept += n_restored
        crops = self._encode(pictures, ids[n_kept:])
        return _Prompt(context, ids, held, pictures, n_kept, n_restored, end, crops)

    def _restore(self, context: Context, ids: Sequence[int], pictures: Sequence[Picture]) -> int:
        """Cells of the empty context that come from disk."""
        if self._engine.prefixes is None:
            return 0
        started = time.perf_counter()
        n = self._engine.prefixes.restore(context, ids, [picture.digest for picture in pictures])
        self._clock.prefill += time.perf_counter() - started
        return n

    def _encode(self, pictures: Sequence[Picture], ids: Sequence[int]) -> Crops:
        """Encode the pictures that are prefilled now and were not encoded before."""
        engine = self._engine
        wanted = {-1 - value for value in ids if value < 0}
        waiting = [picture for i, picture in enumerate(pictures) if i in wanted]
        loaded = engine.vision.load_seconds
        try:
            crops = encode_pictures(waiting, engine.tiles, self._progress, self._cancel)
        finally:
            engine.rest_vision()
        self._clock.vision = crops.seconds - (engine.vision.load_seconds - loaded)
        return crops

    def _prefill(self, prompt: _Prompt) -> None:
        """Put what is not cached into the KV cache; logits for the last token.

        What follows the first ``settle_at`` cells is computed as behind a prefix from disk.
        """
        started, loaded = time.perf_counter(), self._engine.decoder.load_seconds
        ids, n_kept, end = prompt.ids, prompt.n_kept, len(prompt.ids)
        self._progress(Progress("prefill", 0, end - n_kept))
        for start, stop in runs_of(ids, n_kept):

            def report(n_done: int, before: int = start - n_kept) -> None:
                self._progress(Progress("prefill", before + n_done, end - n_kept))

            how: dict[str, Any] = {
                "logits": stop == end,
                "cancel": self._cancel,
                "progress": report,
            }
            if ids[start] >= 0:
                prompt.context.append_tokens(ids[start:stop], **how)
            else:
                first, picture = ids.index(ids[start]), prompt.pictures[-1 - ids[start]]
                if picture.rows is None:
                    raise DecoderError("a picture was not encoded")
                if picture.positions is not None:  # of the whole block: none of it is cached
                    how["positions"] = picture.positions
                prompt.context.append_embeddings(picture.rows[start - first : stop - first], **how)
            if stop == prompt.settle_at:
                prompt.context.settle()
        self._clock.prefill += time.perf_counter() - started
        self._clock.prefill -= self._engine.decoder.load_seconds - loaded

    def _keep(self, prompt: _Prompt) -> None:
        """Write the KV cache up to the last picture's end to disk, if it was computed here."""
        prefixes, end = self._engine.prefixes, prompt.settle_at
        if prefixes and prompt.n_kept < end <= prompt.context.n_positions:
            digests = [picture.digest for picture in prompt.pictures]
            prefixes.keep(prompt.context, prompt.ids[:end], digests)

    def _reply(
        self,
        context: Context,
        choices: Mapping[str, Sequence[int]],
        constraint: Constraint | None,
        lead: str,
        max_tokens: int,
    ) -> Generator[str, None, Reply]:
        manifest = self._engine.manifest
        shared: dict[str, Any] = {
            "lead": lead,
            "clock": self._clock,
            "progress": self._progress,
            "cancel": self._cancel,
        }
        if choices:
            return pick(manifest, context, choices, **shared)
        return generate(
            self._engine.decoder,
            context,
            self._options,
            stop=manifest.tokens.stop,
            max_tokens=max_tokens,
            constraint=constraint,
            keep_partial=self._keep_partial,
            **shared,
        )

    def _answer(self, prompt: _Prompt, reply: Reply, said: str) -> Answer:
        form = self._options.form
        n_new = len(prompt.ids) - prompt.n_kept
        return Answer(
            answer=said,
            token_ids=reply.ids,
            finish_reason=reply.finish,
            prompt_tokens=len(prompt.ids),
            cached_tokens=prompt.n_kept,
            restored_tokens=prompt.n_restored,
            image_tokens=sum(picture.n_tokens for picture in prompt.pictures),
            images=tuple(picture.use for picture in prompt.pictures),
            encoded_crops=prompt.crops.encoded,
            cached_crops=prompt.crops.cached,
            timings=self._clock.timings(self._engine.seconds, n_new, reply.n_computed),
            kv_bytes=prompt.context.kv_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            parsed=form.parse(said) if form else None,
            choices=reply.probabilities,
        )


@dataclass(frozen=True)
class _Prompt:
    """A prompt on its way into the KV cache."""

    context: Context
    ids: tuple[int, ...]
    identity: tuple[int | bytes, ...]
    pictures: tuple[Picture, ...]
    n_kept: int  # cells that are filled already
    n_restored: int  # of them, from disk
    settle_at: int  # behind the last picture, where nothing was cached; else 0
    crops: Crops


def _after_first(
    pieces: Generator[str, None, Reply], then: Callable[[], None]
) -> Generator[str, None, Reply]:
    """The same pieces; ``then`` is called once, when the first was taken or there will be none.

    Copying a KV cache takes a moment, which nobody has to wait for in front of an answer.
    """
    with contextlib.closing(pieces):
        try:
            yield next(pieces)
        except StopIteration as end:
            then()
            reply: Reply = end.value
            return reply
        except (Cancelled, GeneratorExit):
            then()
            raise
        then()
        return (yield from pieces)
