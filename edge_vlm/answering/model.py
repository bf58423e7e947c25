"""The public face: load a bundle, ask, stream, chat."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from edge_vlm.answering.answer import Answer, AskKeywords
from edge_vlm.answering.chat import Chat, Closing, Stream, new_message, options_of, picture_list
from edge_vlm.answering.conversation import Conversation
from edge_vlm.answering.engine import Engine, load_engine
from edge_vlm.bundle.find import find_bundle
from edge_vlm.bundle.manifest import Bundle, Manifest
from edge_vlm.engines import Decoder, VisionTower
from edge_vlm.errors import DecoderError, PromptError
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.pictures.picture import EncodedImage, encode_pictures, open_picture
from edge_vlm.planning.budget import limit_tiles
from edge_vlm.progress import CancelToken, OnProgress, Progress
from edge_vlm.prompt.messages import Message, Text, parse_messages

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
            DecoderError: it was closed.
        """
        if self._engine is None:
            raise DecoderError("the model was closed")
        return self._engine

    def ask(
        self,
        images: Any = (),
        question: str | None = None,
        *,
        messages: Any = None,
        progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        **options: Unpack[AskKeywords],
    ) -> Answer:
        """Answer a question about pictures.

        Args:
            images: one picture or a sequence of them, each a path, bytes, ``data:`` URL, PIL
                image, array or what ``encode`` gave; none for text alone.
            question: what to ask.
            messages: instead of both, a whole conversation in OpenAI's form.
            progress: called after each tile, batch and token.
            cancel: set it from another thread to stop.
            options: those of ``AskOptions``: ``max_tokens``, ``temperature``, ``top_p``,
                ``min_p``, ``seed``, ``max_tiles``, ``within``, ``system``, and one of ``schema``,
                ``choices`` and ``regex``.

        Raises:
            InputError: the request is invalid or too large for the KV budget.
            Cancelled: ``cancel`` was set.
        """
        return self.stream(
            images, question, messages=messages, progress=progress, cancel=cancel, **options
        ).result()

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
        if wanted.system is not None:
            new = [Message("system", (Text(wanted.system),)), *new]
        conversation = Conversation(self.engine)
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
        engine, wanted = self.engine, options_of({"max_tiles": max_tiles})
        limits = [n for n in (wanted.max_tiles, engine.settings.max_tiles) if n is not None]
        processor = limit_tiles(engine.manifest.image_processor, min(limits, default=None))
        picture = open_picture(image, processor, 1, engine)
        try:
            encode_pictures([picture], engine.tiles, progress or (lambda _: None), cancel)
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
        """Free the model. Answers and chats that are still open keep it until they end."""
        if self._engine:
            self._engine.decoder.close()
        self._engine = None
