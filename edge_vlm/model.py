"""The public face: load a bundle, ask, stream, chat."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from edge_vlm.answer import Answer, OnProgress, Progress
from edge_vlm.bundle import Bundle, Manifest
from edge_vlm.cancel import CancelToken
from edge_vlm.conversation import Conversation, Engine
from edge_vlm.decoder import Decoder
from edge_vlm.errors import DecoderError, PromptError
from edge_vlm.folders import find_bundle
from edge_vlm.limits import within_memory
from edge_vlm.machine import MachineSettings, cpu_identity
from edge_vlm.messages import Message, Text, parse_messages, user_message
from edge_vlm.options import AskOptions
from edge_vlm.picture import EncodedImage, encode_pictures, open_picture
from edge_vlm.plan import ModelSizes, limit_tiles
from edge_vlm.prefix_cache import PrefixCache
from edge_vlm.prompt import PromptBuilder
from edge_vlm.store import open_store
from edge_vlm.tile_cache import TileCache
from edge_vlm.tuning import engines_for, load_tuning
from edge_vlm.verify import verify
from edge_vlm.vision import VisionTower

_Self = TypeVar("_Self", bound="_Closing")


class _Closing:
    """``with`` closes."""

    def close(self) -> None:
        raise AttributeError("close")

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class EdgeVLM(_Closing):
    """A loaded model.

    It may be used from several threads at once; each question has a KV cache of its own.

        with EdgeVLM.load() as vlm:
            print(vlm.ask("receipt.jpg", "What is the total?"))
    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self._bundle = bundle
        self._engine: Engine | None = engine

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        settings: MachineSettings | None = None,
        progress: OnProgress | None = None,
    ) -> EdgeVLM:
        """Load a bundle.

        Args:
            model: a bundle's folder or name; by default as ``edge_vlm.folders.find_bundle``.
            settings: the machine's; by default read from ``EDGE_VLM_*``.
            progress: called while the files are compared with their checksums.

        Raises:
            BundleError: there is no such bundle, or it is damaged.
        """
        started = time.perf_counter()
        settings = settings or MachineSettings.from_environment()
        bundle = Bundle.open(find_bundle(model))

        def report(done: int, total: int) -> None:
            if progress:
                progress(Progress("verify", done, total))

        verify(bundle, progress=report)
        tuning = load_tuning(bundle.manifest)
        settings, engines = within_memory(
            settings,
            engines_for(bundle.manifest, settings, tuning),
            ModelSizes.of(bundle.manifest),
        )
        in_turns = settings.residency == "in-turns"
        decoder = Decoder(
            bundle,
            engines,
            kv_type=settings.kv_type,
            kv_budget=settings.kv_budget,
            layers_on_gpu=settings.gpu_layers,
            in_turns=in_turns,
            logs=settings.engine_logs,
        )
        vision = VisionTower(
            bundle,
            engines,
            provider=settings.provider,
            before_load=decoder.release,
            logs=settings.engine_logs,
        )
        cpu = cpu_identity()
        store = open_store(settings)
        tile_identity = {**vision.identity, "cpu": cpu}
        prefix_identity = {**tile_identity, **decoder.identity}
        engine = Engine(
            manifest=bundle.manifest,
            settings=settings,
            prompts=PromptBuilder(bundle.manifest, decoder.chat_template, decoder.tokenize),
            vision=vision,
            decoder=decoder,
            engines=engines,
            speeds=tuning.speeds if tuning else None,
            tiles=TileCache(vision, tile_identity, settings.tile_memory, store),
            prefixes=PrefixCache(store, prefix_identity) if store else None,
            store=store,
            load_seconds=time.perf_counter() - started - decoder.load_seconds,
            in_turns=in_turns,
        )
        return cls(bundle, engine)

    @property
    def manifest(self) -> Manifest:
        """The bundle's description."""
        return self._bundle.manifest

    def ask(
        self,
        images: Any = (),
        question: str | None = None,
        *,
        messages: Any = None,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a question about pictures.

        Args:
            images: one picture or a sequence of them, each a path, bytes, ``data:`` URL, PIL
                image, array or what ``encode`` gave; none for text alone.
            question: what to ask.
            messages: instead of both, a whole conversation in OpenAI's form.
            progress: called after each tile, batch and token.
            cancel: set it from another thread to stop.
            options: fields of ``AskOptions``, such as ``max_tokens`` or ``temperature``.

        Raises:
            InputError: the request is invalid or too large for the KV budget.
            Cancelled: ``cancel`` was set.
        """
        with self.stream(
            images, question, messages=messages, progress=progress, cancel=cancel, **options
        ) as stream:
            for _ in stream:
                pass
        return stream.answer

    def stream(
        self,
        images: Any = (),
        question: str | None = None,
        *,
        messages: Any = None,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        **options: Any,
    ) -> Stream:
        """As ``ask``, but an iterator of pieces of text; afterwards its ``answer`` has the rest."""
        if messages is None:
            new = [_user(images, question)]
        elif question is not None or _sequence(images):
            raise PromptError("give either messages, or images and a question")
        else:
            new = parse_messages(messages)
        wanted = _options(options)
        if wanted.system is not None:
            new = [Message("system", (Text(wanted.system),)), *new]
        conversation = Conversation(self._loaded())
        return Stream(conversation.turn(new, wanted, progress, cancel), conversation.close)

    def encode(
        self,
        image: Any,
        *,
        max_tiles: int | None = None,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
    ) -> EncodedImage:
        """Look at a picture once: what comes back can be given instead of it, again and again.

        Raises:
            ImageError: it cannot be read.
            Cancelled: ``cancel`` was set.
        """
        engine, wanted = self._loaded(), _options({"max_tiles": max_tiles})
        limits = [n for n in (wanted.max_tiles, engine.settings.max_tiles) if n is not None]
        processor = limit_tiles(engine.manifest.image_processor, min(limits, default=None))
        picture = open_picture(
            image, processor, engine.manifest, engine.settings, engine.tiles.model
        )
        try:
            encode_pictures([picture], engine.tiles, progress or (lambda _: None), cancel)
        finally:
            if engine.in_turns:
                engine.vision.release()
        if engine.store:
            engine.store.flush()
        return picture.encoded(engine.tiles.model)

    def chat(self, **options: Any) -> Chat:
        """A conversation that keeps its KV cache: a follow-up costs only its own tokens.

        ``options`` are fields of ``AskOptions``; each question may override them.
        """
        return Chat(Conversation(self._loaded()), options)

    def close(self) -> None:
        """Free the model. Answers and chats that are still open keep it until they end."""
        if self._engine:
            self._engine.decoder.close()
        self._engine = None

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise DecoderError("the model was closed")
        return self._engine


class Chat(_Closing):
    """A conversation; made by ``EdgeVLM.chat``. Use it from one thread at a time."""

    def __init__(self, conversation: Conversation, options: dict[str, Any]) -> None:
        self._conversation = conversation
        self._options = options
        _options(options)

    def ask(
        self,
        question: str,
        images: Any = (),
        *,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        **options: Any,
    ) -> Answer:
        """Answer the next question; arguments and errors as ``EdgeVLM.ask``."""
        with self.stream(question, images, progress=progress, cancel=cancel, **options) as stream:
            for _ in stream:
                pass
        return stream.answer

    def stream(
        self,
        question: str,
        images: Any = (),
        *,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        keep_partial: bool = False,
        **options: Any,
    ) -> Stream:
        """As ``ask``, piece by piece.

        With ``keep_partial``, an answer that is cancelled after it began is kept as far as it went.
        """
        wanted = _options({**self._options, **options})
        new = self._new(question, images, wanted)
        turn = self._conversation.turn(new, wanted, progress, cancel, keep_partial=keep_partial)
        return Stream(turn)

    def retry(
        self,
        *,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        keep_partial: bool = False,
        **options: Any,
    ) -> Stream:
        """Answer the last question again, piece by piece; the old answer goes when that is done.

        Raises:
            PromptError: there is none.
        """
        wanted = _options({**self._options, **options})
        turn = self._conversation.retry(wanted, progress, cancel, keep_partial=keep_partial)
        return Stream(turn)

    def undo(self) -> tuple[Message, ...]:
        """Take the last question and its answer back, and return them."""
        return self._conversation.undo()

    def restart(self, messages: Any = ()) -> None:
        """Begin again, with the answered questions in ``messages`` (OpenAI's form) if given.

        Raises:
            InputError: the messages or one of their pictures cannot be read; nothing changed.
        """
        parsed = parse_messages(messages, answered=True) if messages else []
        wanted = _options(self._options)
        self._conversation.restart(parsed, max_tiles=wanted.max_tiles)

    def n_to_drop(self, question: str, images: Any = (), **options: Any) -> int | None:
        """How many of the oldest questions to drop for this one; None if all would not do."""
        wanted = _options({**self._options, **options})
        return self._conversation.n_to_drop(self._new(question, images, wanted), wanted)

    def drop_oldest(self, n_questions: int) -> list[Any]:
        """Forget the oldest questions and their answers; their pictures stay.

        Returns the pictures if no question is left that could carry them.
        """
        return [part.source for part in self._conversation.drop_oldest(n_questions)]

    def _new(self, question: str, images: Any, wanted: AskOptions) -> list[Message]:
        new = [_user(images, question)]
        if wanted.system is not None and not self._conversation.messages:
            new = [Message("system", (Text(wanted.system),)), *new]
        return new

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far; a turn that failed or was stopped is not among them."""
        return self._conversation.messages

    def close(self) -> None:
        """Free the KV cache."""
        self._conversation.close()


class Stream(_Closing):
    """Pieces of an answer as they are generated; afterwards ``answer`` holds all of it."""

    def __init__(
        self, events: Iterator[str | Answer], on_close: Callable[[], None] | None = None
    ) -> None:
        self._events = events
        self._on_close = on_close
        self._answer: Answer | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        try:
            event = next(self._events)
            if isinstance(event, str):
                return event
            self._answer = event
            next(self._events)  # let the turn end
        except BaseException:
            self.close()
            raise
        raise RuntimeError("a turn goes on after its answer")

    @property
    def answer(self) -> Answer:
        """The whole answer with its counters and finish reason.

        Raises:
            DecoderError: the stream was not read to its end.
        """
        if self._answer is None:
            raise DecoderError("the answer is not complete; read the stream to its end first")
        return self._answer

    def close(self) -> None:
        """Stop here; what was yielded stays valid."""
        close = getattr(self._events, "close", None)
        if close:
            close()
        if self._on_close:
            self._on_close()
            self._on_close = None


def _user(images: Any, question: str | None) -> Message:
    if question is None:
        raise PromptError("there is no question; it follows the images: ask(images, question)")
    if not isinstance(question, str) or not question.strip():
        raise PromptError("the question is empty")
    return user_message(_sequence(images), question)


def _sequence(images: Any) -> Sequence[Any]:
    if images is None:
        return ()
    return images if isinstance(images, list | tuple) else (images,)


def _options(options: dict[str, Any]) -> AskOptions:
    try:
        return AskOptions(**options)
    except TypeError as error:
        raise PromptError(f"options: {str(error).split('__init__() ')[-1]}") from error
