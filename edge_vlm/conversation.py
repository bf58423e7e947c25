"""One conversation's turns: pictures encoded, prompt prefilled, answer generated.

A conversation owns a context. Its KV cache only ever grows by what is new: a turn's own tokens and
pictures. A turn that fails or is stopped is taken back as if it had not been asked.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edge_vlm.answer import Answer, Progress, Timings
from edge_vlm.bundle import ImageProcessor, Manifest
from edge_vlm.cancel import CancelToken
from edge_vlm.decoder import Context, Decoder, Sampler
from edge_vlm.errors import DecoderError
from edge_vlm.machine import MachineSettings
from edge_vlm.memory import peak_rss_bytes
from edge_vlm.messages import Message, Text, check_messages, images_of
from edge_vlm.options import AskOptions
from edge_vlm.picture import Crops, Picture, encode_pictures, open_picture
from edge_vlm.plan import budget_positions, check_budget, limit_tiles
from edge_vlm.prefix_cache import PrefixCache, picture_ends
from edge_vlm.prompt import PromptBuilder, Rendered, Span, TokenSpan
from edge_vlm.store import Store
from edge_vlm.tile_cache import TileCache
from edge_vlm.vision import VisionTower

OnProgress = Callable[[Progress], None]
MIN_ANSWER_TOKENS = 32  # room that a request must leave for its answer


@dataclass(frozen=True)
class Engine:
    """The parts of a loaded model that a turn uses."""

    manifest: Manifest
    settings: MachineSettings
    prompts: PromptBuilder
    vision: VisionTower
    decoder: Decoder
    tiles: TileCache
    prefixes: PrefixCache | None
    store: Store | None  # of both
    load_seconds: float  # without the vision tower


@dataclass
class _State:
    """What the conversation holds so far; replaced as a whole when a turn succeeds."""

    messages: tuple[Message, ...] = ()
    pictures: tuple[Picture, ...] = ()
    text: str = ""  # of the prompt and the answers, as rendered and generated
    ids: tuple[int, ...] = ()  # one an input position; -1 - i for picture i
    n_cached: int = 0  # of them, those in the KV cache


@dataclass
class _Clock:
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


class Conversation:
    """Turns with one model; use it from one thread at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._context: Context | None = None
        self._state = _State()
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
    ) -> Iterator[str | Answer]:
        """Add messages and answer them: yields pieces of text, at last the ``Answer``.

        Raises:
            InputError: the request is invalid or too large; nothing was computed.
            Cancelled: ``cancel`` was set.
            EdgeVLMError: an engine failed.
        """
        if self._busy:
            raise DecoderError("this conversation is already answering; finish or close that first")
        self._busy = True
        try:
            yield from self._turn(new, options, progress or _ignore, cancel)
        finally:
            self._busy = False
            if self._engine.store:
                self._engine.store.flush()

    def close(self) -> None:
        """Free the KV cache."""
        if self._context:
            self._context.close()
        self._context = None
        self._state = _State()

    def _turn(
        self,
        new: Sequence[Message],
        options: AskOptions,
        progress: OnProgress,
        cancel: CancelToken | None,
    ) -> Iterator[str | Answer]:
        engine, old = self._engine, self._state
        clock = _Clock()
        messages = (*old.messages, *new)
        check_messages(messages)
        processor = limit_tiles(engine.manifest.image_processor, options.max_tiles)
        added = tuple(
            open_picture(source, processor, engine.manifest, engine.settings, engine.tiles.model)
            for source in images_of(new)
        )
        pictures = (*old.pictures, *added)
        text, ids = self._prompt(messages, pictures)
        n_kept = _common_prefix(ids, old.ids[: old.n_cached])
        context, max_tokens = self._make_room(len(ids), pictures, processor, options)
        context.truncate(n_kept)  # also what a turn that was stopped has left

        if cancel:
            cancel.check()
        from_nothing = n_kept == 0
        n_restored = self._restore(context, ids, pictures, clock) if from_nothing else 0
        n_kept += n_restored
        crops = self._encode(pictures, ids[n_kept:], clock, progress, cancel)
        keep_at = picture_ends(ids)[-1:] if from_nothing else []
        self._prefill(context, ids, n_kept, pictures, keep_at, clock, progress, cancel)

        answer_ids: list[int] = []
        raw = ""
        finish = "length"
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        seed = secrets.randbits(32) if options.seed is None else options.seed
        with Sampler(engine.decoder, options, seed) as sampler:
            while len(answer_ids) < max_tokens:
                started = time.perf_counter()
                if cancel:
                    cancel.check()
                if answer_ids:
                    context.append_tokens(answer_ids[-1:], logits=True, cancel=cancel)
                token = sampler.sample(context)
                clock.decode += time.perf_counter() - started  # the reader's time is not ours
                if token in engine.manifest.tokens.stop:
                    finish = "stop"
                    break
                answer_ids.append(token)
                progress(Progress("decode", len(answer_ids), max_tokens))
                piece = utf8.decode(engine.decoder.piece(token))
                shown = piece if raw.strip() else piece.lstrip()
                raw += piece
                if shown:
                    yield shown
        if rest := utf8.decode(b"", final=True):
            raw += rest
            yield rest

        reply = Message("assistant", (Text(raw.removeprefix(" ")),))
        self._state = _State(
            messages=(*messages, reply),
            pictures=pictures,
            text=text + raw,
            ids=(*ids, *answer_ids),
            n_cached=context.n_positions,
        )
        yield Answer(
            answer=raw.strip(),
            token_ids=tuple(answer_ids),
            finish_reason=finish,
            prompt_tokens=len(ids),
            cached_tokens=n_kept,
            restored_tokens=n_restored,
            image_tokens=sum(picture.n_tokens for picture in pictures),
            images=tuple(picture.use for picture in pictures),
            encoded_crops=crops.encoded,
            cached_crops=crops.cached,
            timings=_timings(clock, engine, len(ids) - n_kept, len(answer_ids)),
            kv_bytes=context.kv_bytes,
            peak_rss_bytes=peak_rss_bytes(),
        )

    def _prompt(
        self, messages: Sequence[Message], pictures: Sequence[Picture]
    ) -> tuple[str, tuple[int, ...]]:
        """Text and ids of the whole prompt.

        What was generated keeps its ids: if the conversation so far is rendered to the very text
        that is cached, only the rest is tokenized.
        """
        prompts, old = self._engine.prompts, self._state
        rendered = prompts.render(messages)
        text = rendered.plain
        if old.ids and text.startswith(old.text):
            rest = Rendered(_after(rendered, len(old.text)), rendered.mark)
            spans = prompts.spans(rest, first=False)
            return text, (*old.ids, *_ids(spans, pictures, len(old.pictures)))
        return text, _ids(prompts.spans(rendered, first=True), pictures, 0)

    def _make_room(
        self,
        n_prompt: int,
        pictures: Sequence[Picture],
        processor: ImageProcessor,
        options: AskOptions,
    ) -> tuple[Context, int]:
        """A context for the prompt and its answer, and the answer's largest length in it."""
        engine, settings = self._engine, self._engine.settings
        geometry = engine.manifest.decoder
        check_budget(
            n_prompt + min(options.max_tokens, MIN_ANSWER_TOKENS),
            [(p.use.size[1], p.use.size[0]) for p in pictures],
            processor,
            geometry,
            settings.kv_budget,
            settings.kv_type,
        )
        allowed = budget_positions(geometry, settings.kv_budget, settings.kv_type)
        max_tokens = min(options.max_tokens, allowed - n_prompt)
        if self._context is None:
            self._context = engine.decoder.context(n_prompt + max_tokens)
        else:
            self._context.reserve(n_prompt + max_tokens)
        return self._context, max_tokens

    def _restore(
        self, context: Context, ids: Sequence[int], pictures: Sequence[Picture], clock: _Clock
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
        clock: _Clock,
        progress: OnProgress,
        cancel: CancelToken | None,
    ) -> Crops:
        """Encode the pictures that are prefilled now and were not encoded before."""
        engine = self._engine
        wanted = {-1 - value for value in ids if value < 0}
        waiting = [picture for i, picture in enumerate(pictures) if i in wanted]
        loaded = engine.vision.load_seconds
        crops = encode_pictures(waiting, engine.tiles, progress, cancel)
        clock.vision = crops.seconds - (engine.vision.load_seconds - loaded)
        return crops

    def _prefill(
        self,
        context: Context,
        ids: Sequence[int],
        n_kept: int,
        pictures: Sequence[Picture],
        keep_at: Sequence[int],
        clock: _Clock,
        progress: OnProgress,
        cancel: CancelToken | None,
    ) -> None:
        """Put positions ``n_kept`` and after into the KV cache; logits for the last one.

        The first positions up to those in ``keep_at`` are kept on disk.
        """
        started = time.perf_counter()
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
            if position in keep_at and self._engine.prefixes:
                digests = [picture.digest for picture in pictures]
                self._engine.prefixes.keep(context, ids[:position], digests)
        clock.prefill += time.perf_counter() - started


def _ids(spans: Sequence[Span], pictures: Sequence[Picture], n_before: int) -> tuple[int, ...]:
    """One number a position: a token id, or -1 - i where picture i's rows go."""
    ids: list[int] = []
    for span in spans:
        if isinstance(span, TokenSpan):
            ids += span.ids
        else:
            index = n_before + span.index
            ids += [-1 - index] * pictures[index].n_tokens
    return tuple(ids)


def _after(rendered: Rendered, n_plain: int) -> str:
    """What follows the first ``n_plain`` characters that are not marks."""
    for index, character in enumerate(rendered.text):
        if n_plain == 0 and character != rendered.mark:
            return rendered.text[index:]
        if character != rendered.mark:
            n_plain -= 1
    return ""


def _common_prefix(ids: Sequence[int], cached: Sequence[int]) -> int:
    """Leading positions that are the same; at least one is left to compute logits from."""
    n = 0
    for new, old in zip(ids[:-1], cached, strict=False):
        if new != old:
            break
        n += 1
    return n


def _timings(clock: _Clock, engine: Engine, n_prefilled: int, n_decoded: int) -> Timings:
    return Timings(
        load=engine.load_seconds + engine.vision.load_seconds,
        vision=clock.vision,
        prefill=clock.prefill,
        decode=clock.decode,
        prefill_tokens_per_second=_rate(n_prefilled, clock.prefill),
        decode_tokens_per_second=_rate(n_decoded, clock.decode),
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _ignore(_: Progress) -> None:
    pass
