"""The public face: load a bundle, ask, stream, chat."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

from edge_vlm.answering.answer import (
    Answer,
    AskKeywords,
    AskOptions,
    RequestKeywords,
    TurnKeywords,
)
from edge_vlm.answering.conversation import Conversation, Steps
from edge_vlm.answering.engine import load_engine
from edge_vlm.bundle.find import find_bundle
from edge_vlm.bundle.manifest import Bundle, Manifest
from edge_vlm.errors import DecoderError, PromptError
from edge_vlm.machine.process import check_fork
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.pictures.picture import EncodedImage, encode_pictures, open_picture
from edge_vlm.planning.budget import limit_tiles
from edge_vlm.progress import CancelToken, Life, OnProgress, Progress
from edge_vlm.prompt.messages import Message, Text, cropped, images_of, parse_messages, user_message

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from edge_vlm.answering.turn import Engine
    from edge_vlm.engines import Decoder, VisionTower


class Closing:
    """``with`` closes. Any thread may close; every use is then an error, also one that goes on."""

    def close(self) -> None:
        """Stop what goes on, and free what is held behind it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Stream(Closing):
    """Pieces of an answer as they are generated; afterwards ``answer`` holds all of it."""

    def __init__(self, events: Steps, on_close: Callable[[], None] = lambda: None) -> None:
        self._events = events
        self._on_close = on_close
        self._answer: Answer | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        if self._answer is not None:
            raise StopIteration
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
    def is_complete(self) -> bool:
        """Whether it was read to its end."""
        return self._answer is not None

    @property
    def answer(self) -> Answer:
        """The whole answer with its counters and finish reason.

        Raises:
            DecoderError: the stream was not read to its end.
        """
        if self._answer is None:
            raise DecoderError("the answer is not complete; read the stream to its end first")
        return self._answer

    def result(self) -> Answer:
        """Read to the end; the whole answer."""
        with self:
            for _ in self:
                pass
        return self.answer

    def close(self) -> None:
        """Stop here; what was yielded stays valid."""
        self._events.close()
        self._on_close()


class Chat(Closing):
    """A conversation; made by ``EdgeVLM.chat``. It does one thing at a time.

    Pictures come first and the question last, as everywhere; a question alone is enough.
    """

    def __init__(self, conversation: Conversation, options: AskKeywords) -> None:
        self.conversation = conversation
        self._options = options
        options_of(options)

    @overload
    def ask(self, question: str, /, **how: Unpack[TurnKeywords]) -> Answer: ...

    @overload
    def ask(self, images: Any, question: str, **how: Unpack[TurnKeywords]) -> Answer: ...

    def ask(self, *asked: Any, **how: Any) -> Answer:
        """Answer the next question; arguments and errors as ``EdgeVLM.ask``."""
        return self.stream(*asked, **how).result()

    @overload
    def stream(
        self, question: str, /, *, keep_partial: bool = False, **how: Unpack[TurnKeywords]
    ) -> Stream: ...

    @overload
    def stream(
        self, images: Any, question: str, *, keep_partial: bool = False, **how: Unpack[TurnKeywords]
    ) -> Stream: ...

    def stream(
        self,
        images: Any = (),
        question: str | None = None,
        *,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        keep_partial: bool = False,
        **options: Any,
    ) -> Stream:
        """As ``ask``, piece by piece.

        With ``keep_partial``, an answer that is cancelled after it began is kept as far as it went.
        """
        wanted, new = self._request(images, question, options)
        turn = self.conversation.turn(new, wanted, progress, cancel, keep_partial=keep_partial)
        return Stream(turn)

    def retry(
        self,
        *,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        keep_partial: bool = False,
        **options: Unpack[AskKeywords],
    ) -> Stream:
        """Answer the last question again, piece by piece; the old answer goes when that is done.

        Raises:
            PromptError: there is none.
        """
        wanted = options_of({**self._options, **options})
        turn = self.conversation.retry(wanted, progress, cancel, keep_partial=keep_partial)
        return Stream(turn)

    def undo(self) -> tuple[Message, ...]:
        """Take the last question and its answer back, and return them."""
        return self.conversation.undo()

    def restart(self, messages: Any = ()) -> None:
        """Begin again, with the answered questions in ``messages`` (OpenAI's form) if given.

        Raises:
            InputError: the messages or one of their pictures cannot be read; nothing changed.
        """
        parsed = parse_messages(messages, answered=True) if messages else []
        self.conversation.restart(parsed, max_tiles=options_of(self._options).max_tiles)

    def n_to_drop(self, images: Any, question: str, **options: Unpack[AskKeywords]) -> int | None:
        """How many of the oldest questions to drop for this one; None if all would not do."""
        wanted, new = self._request(images, question, options)
        return self.conversation.n_to_drop(new, wanted)

    def drop_oldest(self, n_questions: int) -> list[Any]:
        """Forget the oldest questions and their answers; their pictures stay.

        Returns the pictures if no question is left that could carry them.
        """
        return [part.source for part in self.conversation.drop_oldest(n_questions)]

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far; a turn that failed or was stopped is not among them."""
        return self.conversation.messages

    def close(self) -> None:
        """Stop its answer and free the KV cache."""
        self.conversation.close()

    def _request(
        self, images: Any, question: str | None, options: Any
    ) -> tuple[AskOptions, list[Message]]:
        wanted = options_of({**self._options, **options})
        if question is None and isinstance(images, str):
            images, question = (), images
        new = in_part([new_message(images, question)], wanted)
        return wanted, new if self.conversation.messages else with_system(new, wanted)


def new_message(images: Any, question: str | None) -> Message:
    """A user's message.

    Raises:
        PromptError: there is no question.
    """
    if question is None:
        raise PromptError("there is no question; it follows the images: ask(images, question)")
    if not isinstance(question, str):
        raise PromptError("pictures come first, the question last: ask(images, question)")
    if not question.strip():
        raise PromptError("the question is empty")
    return user_message(picture_list(images), question)


def in_part(new: list[Message], wanted: AskOptions) -> list[Message]:
    """The messages with those parts of their pictures that are wanted."""
    return new if wanted.crop is None else cropped(new, wanted.crop)


def with_system(new: list[Message], wanted: AskOptions) -> list[Message]:
    """The messages that begin a conversation."""
    return new if wanted.system is None else [Message("system", (Text(wanted.system),)), *new]


def picture_list(images: Any) -> Sequence[Any]:
    """Several pictures, one or none, as a sequence."""
    if images is None:
        return ()
    return images if isinstance(images, list | tuple) else (images,)


def options_of(options: AskKeywords | dict[str, Any]) -> AskOptions:
    """The options that keywords give.

    Raises:
        PromptError: one is unknown or out of its range.
    """
    try:
        return AskOptions(**options)
    except TypeError as error:
        raise PromptError(f"options: {str(error).split('__init__() ')[-1]}") from error


class EdgeVLM(Closing):
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
        vision: VisionTower | None = None,
        decoder: Decoder | None = None,
    ) -> EdgeVLM:
        """Load a bundle.

        Args:
            model: a bundle's folder or name; by default as ``bundle.find.find_bundle``.
            settings: the machine's; by default read from ``EDGE_VLM_*``.
            progress: called while the files are compared with their checksums.
            vision: an engine of your own in place of onnxruntime.
            decoder: one in place of llama.cpp.

        Raises:
            BundleError: there is no such bundle, or it is damaged.
        """

        def report(done: int, total: int) -> None:
            if progress:
                progress(Progress("verify", done, total))

        check_fork()
        settings = settings or MachineSettings.from_environment()
        bundle = Bundle.open(find_bundle(model))
        return cls(bundle, load_engine(bundle, settings, report, vision, decoder))

    @property
    def manifest(self) -> Manifest:
        """The bundle's description."""
        return self._bundle.manifest

    @property
    def engine(self) -> Engine:
        """The parts it is made of.

        Raises:
            DecoderError: it was closed, or this process was forked off one that had used a model.
        """
        check_fork()
        engine = self._engine
        if engine is None:
            raise DecoderError("the model was closed")
        return engine

    def ask(
        self, images: Any = (), question: str | None = None, **how: Unpack[RequestKeywords]
    ) -> Answer:
        """Answer a question about pictures.

        Args:
            images: one picture or a sequence of them, each a path, bytes, ``data:`` URL, object
                with ``read`` or ``__array__``, PIL image, array or what ``encode`` gave; none for
                text alone. ``report.pdf#page=3`` is a page, ``film.gif#frame=2`` a frame.
            question: what to ask.
            how: options of ``AskOptions`` (``max_tokens``, ``temperature``, ``top_p``, ``min_p``,
                ``seed``, ``max_tiles``, ``crop``, ``within``, ``system``, and one of ``schema``,
                ``choices`` and ``regex``); ``messages``, a whole conversation in OpenAI's form
                instead of pictures and a question; ``progress``, called after each tile, batch
                and token; ``cancel``, a token that is set from another thread to stop.

        Raises:
            InputError: the request is invalid or too large for the KV budget.
            Cancelled: ``cancel`` was set.
        """
        return self.stream(images, question, **how).result()

    def stream(
        self,
        images: Any = (),
        question: str | None = None,
        *,
        messages: Any = None,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        **options: Unpack[AskKeywords],
    ) -> Stream:
        """As ``ask``, but an iterator of pieces of text; afterwards its ``answer`` has the rest."""
        if messages is None:
            new = [new_message(images, question)]
        elif question is not None or picture_list(images):
            raise PromptError("give either messages, or images and a question")
        else:
            new = parse_messages(messages)
        wanted = options_of(options)
        new = with_system(in_part(new, wanted), wanted)
        conversation = Conversation(self.engine)
        return Stream(conversation.turn(new, wanted, progress, cancel), conversation.close)

    def encode(
        self,
        image: Any,
        *,
        max_tiles: int | None = None,
        crop: Any = None,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
    ) -> EncodedImage:
        """Look at a picture once: what comes back can be given instead of it, again and again.

        Raises:
            ImageError: it cannot be read.
            Cancelled: ``cancel`` was set.
        """
        engine, wanted = self.engine, options_of({"max_tiles": max_tiles, "crop": crop})
        limits = [n for n in (wanted.max_tiles, engine.settings.max_tiles) if n is not None]
        processor = limit_tiles(engine.manifest.image_processor, min(limits, default=None))
        (message,) = in_part([user_message((image,), "")], wanted)
        (source,) = images_of([message])
        life = Life("the model", part_of=engine.life)
        with life.call(), life.cancel.following(cancel):
            picture = open_picture(source, processor, 1, engine)
            try:
                encode_pictures([picture], engine.tiles, progress or _ignore, life.cancel)
            finally:
                if engine.in_turns:
                    engine.vision.release()
            if engine.store:
                engine.store.flush()
            return picture.encoded(engine.tiles.model)

    def chat(self, **options: Unpack[AskKeywords]) -> Chat:
        """A conversation that keeps its KV cache: a follow-up costs only its own tokens.

        Each question may override the options.
        """
        return Chat(Conversation(self.engine), options)

    def close(self) -> None:
        """Free the model, and close all chats and streams of it; answers that go on are stopped."""
        engine, self._engine = self._engine, None
        if engine:
            engine.life.close()


def _ignore(_: Progress) -> None:
    pass
