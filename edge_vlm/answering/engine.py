"""The parts of a loaded model."""

from __future__ import annotations

from dataclasses import dataclass

from edge_vlm.bundle.manifest import Manifest
from edge_vlm.decoder.decoder import Decoder
from edge_vlm.decoder.prefix_cache import PrefixCache
from edge_vlm.machine.engine_settings import EngineSettings
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.machine.store import Store
from edge_vlm.pictures.tile_cache import TileCache
from edge_vlm.pictures.tower import VisionTower
from edge_vlm.planning.speeds import Speeds
from edge_vlm.prompt.builder import PromptBuilder


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
    load_seconds: float  # without what is loaded later
    in_turns: bool = False  # see RESIDENCIES

    @property
    def seconds(self) -> float:
        """All loading so far."""
        return self.load_seconds + self.vision.load_seconds + self.decoder.load_seconds
