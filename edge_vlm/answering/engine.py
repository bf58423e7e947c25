"""Loading a bundle: its files checked, its engines started."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_vlm.answering.trial import try_once
from edge_vlm.answering.turn import Engine
from edge_vlm.bundle.checksums import verify
from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME
from edge_vlm.machine.settings import MachineSettings, cpu_identity
from edge_vlm.machine.store import open_store
from edge_vlm.pictures.picture import TileCache
from edge_vlm.planning.limits import within_memory
from edge_vlm.planning.request import ModelSizes
from edge_vlm.planning.tuning import engines_for, load_tuning
from edge_vlm.progress import Life
from edge_vlm.prompt.builder import PrefixCache, PromptBuilder

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm.engines import Decoder, VisionTower
    from edge_vlm.machine.engine_settings import EngineSettings


def load_engine(
    bundle: Bundle,
    settings: MachineSettings,
    progress: Callable[[int, int], None],
    vision: VisionTower | None = None,
    decoder: Decoder | None = None,
) -> Engine:
    """Check a bundle's files and load its engines, or take those that are given.

    ``progress`` is called with bytes compared with their checksums, and bytes in all; ``vision``
    takes the place of onnxruntime, ``decoder`` that of llama.cpp.

    Raises:
        BundleError: a file is damaged, or an engine refuses it or does not survive it.
        BudgetError: the memory that the settings allow is too little.
    """
    started = time.perf_counter()
    verify(bundle, progress=progress)
    tuning = load_tuning(bundle.manifest)
    settings, engines = within_memory(
        settings, engines_for(bundle.manifest, settings, tuning), ModelSizes.of(bundle.manifest)
    )
    in_turns = settings.residency == "in-turns"
    parts = [name for name, given in ((DECODER_NAME, decoder), (VISION_NAME, vision)) if not given]
    is_tried = try_once(bundle, settings, engines, parts)
    decoder = decoder or _llama(bundle, settings, engines, in_turns, is_tried)
    vision = vision or _onnxruntime(bundle, settings, engines, decoder.release)
    store = open_store(settings)
    llama, onnxruntime = decoder, vision

    def free() -> None:
        llama.close()
        onnxruntime.release()

    tile_identity = {**vision.identity, "cpu": cpu_identity()}
    prefix_identity = {**tile_identity, **decoder.identity}
    return Engine(
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
        life=Life("the model", free),
        load_seconds=time.perf_counter() - started - decoder.load_seconds,
        in_turns=in_turns,
    )


def _llama(
    bundle: Bundle,
    settings: MachineSettings,
    engines: EngineSettings,
    in_turns: bool,
    is_tried: bool,
) -> Decoder:
    from edge_vlm.decoder.decoder import LlamaDecoder

    return LlamaDecoder(
        bundle,
        engines,
        kv_type=settings.kv_type,
        kv_budget=settings.kv_budget,
        layers_on_gpu=settings.gpu_layers,
        in_turns=in_turns,
        logs=settings.engine_logs,
        is_checked=is_tried,
    )


def _onnxruntime(
    bundle: Bundle,
    settings: MachineSettings,
    engines: EngineSettings,
    before_load: Callable[[], None],
) -> VisionTower:
    from edge_vlm.pictures.tower import OnnxTower

    return OnnxTower(
        bundle,
        engines,
        provider=settings.provider,
        before_load=before_load,
        logs=settings.engine_logs,
    )
