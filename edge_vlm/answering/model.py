"""The public face: load a bundle, ask, stream, chat."""

from __future__ import annotations

import os
import time
from typing import Any

from edge_vlm.answering.answer import Answer
from edge_vlm.answering.chat import Chat, Closing, Stream, new_message, options_of, picture_list
from edge_vlm.answering.conversation import Conversation
from edge_vlm.answering.engine import Engine
from edge_vlm.bundle.checksums import verify
from edge_vlm.bundle.find import find_bundle
from edge_vlm.bundle.manifest import Bundle, Manifest
from edge_vlm.decoder.decoder import Decoder
from edge_vlm.decoder.prefix_cache import PrefixCache
from edge_vlm.errors import DecoderError, PromptError
from edge_vlm.machine.settings import MachineSettings, cpu_identity
from edge_vlm.machine.store import open_store
from edge_vlm.pictures.picture import EncodedImage, encode_pictures, open_picture
from edge_vlm.pictures.tile_cache import TileCache
from edge_vlm.pictures.tower import VisionTower
from edge_vlm.planning.budget import limit_tiles
from edge_vlm.planning.limits import within_memory
from edge_vlm.planning.request import ModelSizes
from edge_vlm.planning.tuning import engines_for, load_tuning
from edge_vlm.progress import CancelToken, OnProgress, Progress
from edge_vlm.prompt.builder import PromptBuilder
from edge_vlm.prompt.messages import Message, Text, parse_messages


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
    ) -> EdgeVLM:
        """Load a bundle.

        Args:
            model: a bundle's folder or name; by default as ``edge_vlm.bundle.find.find_bundle``.
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
            new = [new_message(images, question)]
        elif question is not None or picture_list(images):
            raise PromptError("give either messages, or images and a question")
        else:
            new = parse_messages(messages)
        wanted = options_of(options)
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
        engine, wanted = self._loaded(), options_of({"max_tiles": max_tiles})
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
