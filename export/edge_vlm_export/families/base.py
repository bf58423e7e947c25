"""What a family of models supplies to the exporter.

A family is a folder beside this file, of the same name as its other half in ``edge_vlm.families``.
It reads the settings of its checkpoints; everything else follows from them: which tensors there
are, the vision tower, the decoder, the parts of the manifest. Nothing outside ``families/`` knows
more about a model than this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edge_vlm.families.base import Family as Runtime
from edge_vlm.families.base import (
    Float32,
    ImageProcessor,
    Prompt,
    Tiles,
    Tokens,
    UInt8,
    find_family,
)

if TYPE_CHECKING:
    from edge_vlm.families.sizes import Vision
    from edge_vlm_export.checkpoint.tensors import Checkpoint, Shape, Values
    from edge_vlm_export.checkpoint.tokenizer import Tokenizer
    from edge_vlm_export.families.llama_like import LlamaLike
    from edge_vlm_export.graph.architecture import Tower

# Mean and standard deviation of a random tensor's values.
Spread = tuple[float, float]


@dataclass(frozen=True)
class Settings:
    """What the settings files of a checkpoint say; a family adds what it needs besides."""

    image_processor: ImageProcessor
    stop_ids: tuple[int, ...]
    chat_template: str
    name: str | None  # a hub name ("owner/model") that config.json mentions
    tie_word_embeddings: tuple[bool | None, ...]  # what each level of config.json says


class Family(ABC):
    """One family; there is a single object of each."""

    name: ClassVar[str]  # the runtime family's
    summary: ClassVar[str]  # what its models are made of, in a few words
    model_types: ClassVar[tuple[str, ...]]  # in config.json
    # What a download has to have besides config.json and the weights, and what it takes if there.
    required_files: ClassVar[tuple[str, ...]]
    optional_files: ClassVar[tuple[str, ...]] = ()
    # Checkpoints without weights that come with the exporter, to make random ones of.
    configs: ClassVar[Mapping[str, tuple[Path, ...]]] = {}

    @property
    def runtime(self) -> Runtime:
        """The family's other half."""
        return find_family(self.name)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is that of one of its models."""
        return config.get("model_type") in self.model_types

    @abstractmethod
    def read_settings(self, folder: Path) -> Any:
        """Read and validate the settings files.

        Returns:
            A subclass of ``Settings`` of the family's own, which the other methods are given.

        Raises:
            CheckpointError: a file is missing or malformed, files contradict each other, or a value
                is not supported; the message names file, key and value.
        """

    def rename(self, stored: str) -> str | None:
        """The name that a stored tensor goes by here; None for one that means nothing."""
        return stored

    @abstractmethod
    def tower(self, settings: Any) -> Tower:
        """The vision tower and connector."""

    @abstractmethod
    def decoder(self, settings: Any) -> LlamaLike:
        """The language model."""

    def unused(self, settings: Any) -> Mapping[str, Shape]:
        """Tensors that may be stored besides those of tower and decoder."""
        return {}

    def check(self, settings: Any, tensors: Checkpoint) -> None:
        """Look at what names and shapes do not tell.

        Raises:
            CheckpointError: a tensor's values are not supported.
        """
        del settings, tensors

    @abstractmethod
    def read_tokenizer(self, folder: Path, settings: Any) -> Tokenizer:
        """Read the tokenizer's files and check them against the settings.

        Raises:
            CheckpointError: malformed, of another kind, or without a token that the model needs.
        """

    def added_row(self, settings: Any, tokenizer: Tokenizer) -> tuple[str, int] | None:
        """The token whose row of the decoder's table is added to every vector of a picture.

        With the name it has in the graph; None where the vectors stand in its place.
        """
        return None

    def markers(self, settings: Any, tokenizer: Tokenizer, tensors: Checkpoint) -> Values | None:
        """``marker_embeddings`` (n_markers, hidden_size), if the runtime wants any."""
        return None

    def sample(self, pixels: UInt8, processor: Any) -> Tiles:
        """The crops of a picture (height, width, 3), all of one size, to calibrate with."""
        tiles: Tiles = self.runtime.cut(pixels, processor)
        return tiles

    def is_blank(self, crop: Float32) -> bool:
        """Whether the tower makes nothing of a crop (n_patches, patch_values)."""
        return False

    @abstractmethod
    def vision_sizes(self, settings: Any, precision: str) -> Vision:
        """The manifest's part about the tower."""

    @abstractmethod
    def tokens(self, settings: Any, tokenizer: Tokenizer) -> Tokens:
        """The manifest's part about token ids."""

    @abstractmethod
    def prompt(self, settings: Any, tokenizer: Tokenizer) -> Prompt:
        """The manifest's part about the prompt."""

    def made_up_tokens(self, settings: Any) -> Mapping[str, int]:
        """Special tokens and their ids for the made-up byte-level BPE of a random checkpoint.

        The first one ends a text. Empty where only a real one will do.
        """
        return {}

    def spread(self, name: str, shape: Shape, settings: Any) -> Spread | None:
        """Of a random tensor's values; None where what is usual does."""
        return None
