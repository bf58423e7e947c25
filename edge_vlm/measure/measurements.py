"""What a ``Worker`` measures, in its process."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from edge_vlm.answering.conversation import Conversation
from edge_vlm.answering.model import Chat, EdgeVLM
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.decoder.decoder import LlamaDecoder
from edge_vlm.families.base import family_of
from edge_vlm.machine.engine_settings import EngineSettings
from edge_vlm.machine.memory import peak_rss_bytes
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.pictures.tower import OnnxTower

if TYPE_CHECKING:
    from edge_vlm.answering.answer import AskKeywords

QUESTION = "What is in this picture?"


class Measurements:
    """Tasks of a ``Worker``. What was loaded stays until a request needs it otherwise."""

    def __init__(self) -> None:
        self._decoder: tuple[Any, Any] = (None, None)
        self._tower: tuple[Any, Any] = (None, None)

    def answer(
        self,
        *,
        model: str,
        settings: dict[str, Any],
        size: tuple[int, int],
        tokens: int,
        max_tiles: int | None = None,
    ) -> dict[str, Any]:
        """Load a model and answer one question about a random picture of ``size``."""
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
        started = time.perf_counter()
        vlm = EdgeVLM.load(model, settings=MachineSettings(**settings).without_cache())
        engine = vlm.engine
        # A stop token, which a random model may give at any time, does not stop.
        endless = engine.manifest.model_copy(
            update={"tokens": engine.manifest.tokens.model_copy(update={"stop": ()})}
        )
        conversation = Conversation(replace(engine, manifest=endless))
        decoded: list[float] = []

        def progress(event: Any) -> None:
            if event.stage == "decode":
                decoded.append(time.perf_counter())

        options: AskKeywords = {"max_tokens": tokens, "temperature": 0}
        asked = time.perf_counter()
        with Chat(conversation, options) as chat:
            answer = chat.ask([pixels], QUESTION, progress=progress, max_tiles=max_tiles)
            context = conversation.context
            held, positions = (context.state_bytes, context.n_positions) if context else (0, 0)
        times = answer.timings
        later = engine.vision.load_seconds + engine.decoder.load_seconds  # while asking
        n_crops = answer.images[0].crops
        return {
            "crops": n_crops,
            "image_tokens": answer.image_tokens,
            "prompt_tokens": answer.prompt_tokens,
            "load_seconds": times.load,
            "vision_seconds": times.vision,
            "vision_seconds_per_tile": times.vision / n_crops,
            "prefill_seconds": times.prefill,
            "prefill_tokens_per_second": times.prefill_tokens_per_second,
            "decode_tokens_per_second": (len(decoded) - 1) / (decoded[-1] - decoded[0]),
            "first_token_seconds": decoded[0] - asked - later,
            "cold_first_token_seconds": decoded[0] - started,
            "total_seconds": decoded[-1] - asked - later,
            "kv_bytes": answer.kv_bytes,
            "kv_positions": positions,
            "kv_bytes_in_use": held,
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def decoder(
        self, *, model: str, engines: dict[str, Any], kv_type: str, prompt: int, answer: int
    ) -> dict[str, float]:
        """Seconds to prefill ``prompt`` positions and to decode ``answer`` tokens behind them."""
        key = [model, kv_type, engines["repack"], engines["mmap"]]
        fresh = key != self._decoder[0]
        if fresh:
            self._decoder = (None, None)
            gc.collect()
            decoder = LlamaDecoder(Bundle.open(model), EngineSettings(**engines), kv_type=kv_type)
            self._decoder = (key, decoder)
        decoder = self._decoder[1]
        decoder.use(EngineSettings(**engines))
        n_ids = decoder.n_ids
        ids = [(7 + 13 * i) % (n_ids - 256) for i in range(prompt)]
        with decoder.working(), decoder.context(prompt + answer) as context:
            if fresh:
                context.append_tokens(ids[:8], logits=True)  # the weights' first use
                context.truncate(0)
            started = time.perf_counter()
            context.append_tokens(ids, logits=True)
            context.settle()
            prefilled = time.perf_counter()
            for index in range(answer):
                context.append_tokens([ids[index % prompt]], logits=True)
            ended = time.perf_counter()
        return {"prefill": prefilled - started, "decode": ended - prefilled}

    def vision(self, *, model: str, engines: dict[str, Any], crops: int) -> dict[str, float]:
        """Seconds to encode ``crops`` random tiles."""
        fresh = [model, engines] != self._tower[0]
        if fresh:
            self._tower = (None, None)
            tower = OnnxTower(Bundle.open(model), EngineSettings(**engines))
            self._tower = ([model, engines], tower)
        tower = self._tower[1]
        processor = Bundle.open(model).manifest.image_processor
        shape = (crops, *processor.crop_shape)
        pixels = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        feed = family_of(processor).inputs(pixels, processor)
        if fresh:
            first = range(min(crops, tower.crops_at_once))
            list(tower.encode_parts(feed, first))  # memory is laid out in the first run
        started = time.perf_counter()
        list(tower.encode_parts(feed))
        return {"vision": time.perf_counter() - started}

    def load(self, *, model: str, engines: dict[str, Any]) -> dict[str, float]:
        """Seconds from the start of the process to a loaded model, vision tower included."""
        settings = MachineSettings(**engines, residency="together", trust_bundle=True)
        with EdgeVLM.load(model, settings=settings.without_cache()) as vlm:
            vlm.engine.vision.load()
            return {"load": time.time() - psutil.Process().create_time()}


MEASUREMENTS = Measurements()
