"""A checkpoint opened as a model of its family: checked as far as names, shapes and settings go."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import CheckpointError
from edge_vlm.families.sizes import Decoder
from edge_vlm_export.checkpoint.adapter import Adapter, beside
from edge_vlm_export.checkpoint.tensors import Checkpoint, Shape, Values
from edge_vlm_export.families.registry import family_of

if TYPE_CHECKING:
    from edge_vlm_export.checkpoint.tokenizer import Tokenizer
    from edge_vlm_export.families.base import Family
    from edge_vlm_export.families.llama_like import LlamaLike, TextSettings
    from edge_vlm_export.graph.architecture import Tower


class Description:
    """What the settings files in a folder say; weights and tokenizer may be missing.

    Raises:
        CheckpointError: see ``Family.read_settings``, or the model is of no known family.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.family: Family = family_of(folder)
        self.settings: Any = self.family.read_settings(folder)

    @cached_property
    def tower(self) -> Tower:
        """The vision tower and connector."""
        return self.family.tower(self.settings)

    @cached_property
    def decoder(self) -> LlamaLike:
        """The language model."""
        return self.family.decoder(self.settings)

    @property
    def text(self) -> TextSettings:
        """The language model's sizes."""
        return self.decoder.text

    def shapes(self) -> dict[str, Shape]:
        """Every tensor of a checkpoint, the head where the settings do not tie it."""
        tower, decoder = self.tower, self.decoder
        shapes = tower.shapes() | dict(tower.unused) | decoder.shapes()
        shapes |= self.family.unused(self.settings)
        if not any(self.settings.tie_word_embeddings):
            shapes[decoder.head] = decoder.head_shape
        return shapes


class Model(Description):
    """A checkpoint with its tensors, of which only the headers were read so far.

    Raises:
        CheckpointError: see ``Description``; or a tensor is missing, superfluous, of another shape
            or not supported, or the presence of an output head contradicts the config; or there is
            an adapter that was not asked for, or that does not fit.
    """

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        super().__init__(folder)
        problem = beside([path.name for path in folder.iterdir()])
        if problem and not (adapter and adapter.resolve() == folder.resolve()):
            raise CheckpointError(f"{folder}: {problem}")
        self.adapter = Adapter.open(adapter) if adapter else None
        self.tensors = Checkpoint.open(folder, self.family.rename)
        self.tied = self._check_tensors()
        if self.adapter:
            self.tensors = self._merged(self.adapter)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Vocabulary and merges; see ``Family.read_tokenizer``."""
        return self.family.read_tokenizer(self.folder, self.settings)

    def added_row(self) -> tuple[str, Values] | None:
        """What the graph adds to the vectors of a picture (1, hidden_size), and its name there."""
        added = self.family.added_row(self.settings, self.tokenizer)
        return added and (added[0], self.decoder.rows(self.tensors, [added[1]]))

    def markers(self) -> Values | None:
        """``marker_embeddings`` (n_markers, hidden_size)."""
        return self.family.markers(self.settings, self.tokenizer, self.tensors)

    def decoder_sizes(self, precision: str) -> Decoder:
        """The manifest's part about the decoder."""
        sizes = asdict(self.text)
        sizes |= sizes.pop("attention")
        known = {name: size for name, size in sizes.items() if name in Decoder.model_fields}
        return Decoder(precision=precision, tied_head=self.tied, **known)

    def _merged(self, adapter: Adapter) -> Checkpoint:
        """The tensors with an adapter's in them."""
        table = self.decoder.table
        merged = adapter.merge(self.tensors, self.family.rename, {*table, *self.tower.tensors})
        if self.tied and any(merged[name] is not self.tensors[name] for name in table):
            raise CheckpointError(
                f"{adapter.folder}: replaces the token table, which this base has in common with"
                " its output head"
            )
        self.family.check(self.settings, merged)
        return merged

    def _check_tensors(self) -> bool:
        """Compare the tensors with the settings; returns whether the head is tied."""
        tensors, decoder, tower = self.tensors, self.decoder, self.tower
        tied = decoder.head not in tensors
        told = [level for level in self.settings.tie_word_embeddings if level is not None]
        if told and tied not in told:
            presence = "has no" if tied else "has a"
            raise CheckpointError(
                f"{tensors.where}: {presence} tensor {decoder.head}, but tie_word_embeddings in"
                f" config.json is {'false' if tied else 'true'}"
            )
        required = decoder.shapes() | tower.shapes()
        if not tied:
            required[decoder.head] = decoder.head_shape
        tensors.check(required, {**tower.unused, **self.family.unused(self.settings)})
        self.family.check(self.settings, tensors)
        return tied
