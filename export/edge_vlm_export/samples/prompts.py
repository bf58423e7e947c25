"""Calibration conversations as decoder inputs: token ids and the rows of pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_vlm.decoder.decoder import LlamaDecoder
from edge_vlm.families.base import family_of
from edge_vlm.machine.engine_settings import untuned
from edge_vlm.pictures.image import load_image
from edge_vlm.pictures.tower import OnnxTower
from edge_vlm.planning.budget import limit_tiles
from edge_vlm.prompt.builder import PromptBuilder, TokenSpan
from edge_vlm_export.samples.conversations import Prompt

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm_export.samples.conversations import Sample

MAX_TILES = 2  # of a picture, besides the thumbnail: enough to measure, and soon computed
MAX_POSITIONS = 2048  # of a prompt


class PromptMaker:
    """Tiles, encodes and tokenizes as the runtime does; ``with`` frees the engines.

    Raises:
        EdgeVLMError: an engine refuses its file.
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._processor = limit_tiles(bundle.manifest.image_processor, MAX_TILES)
        self._tower = OnnxTower(bundle, replace(untuned(), vision_threads=threads))
        self._markers = self._tower.marker_embeddings
        self._decoder = LlamaDecoder(bundle, in_turns=True)  # the vocabulary alone is loaded
        template = self._decoder.chat_template
        self._builder = PromptBuilder(bundle.manifest, template, self._decoder.tokenize)

    def __enter__(self) -> PromptMaker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._decoder.close()

    def make(self, sample: Sample) -> Prompt:
        """One sample's prompt, cut off at ``MAX_POSITIONS``.

        Raises:
            EdgeVLMError: the picture cannot be read, or an engine failed.
        """
        family = family_of(self._processor)
        tiles = family.cut(load_image(sample.picture), self._processor)
        embeddings = self._tower.encode(tiles)
        rows = family.rows(embeddings, self._markers, tiles.plan, self._processor)
        messages = sample.messages
        rendered = self._builder.render(messages, generation_prompt=messages[-1].role == "user")
        placed = family.positions(tiles.plan, self._processor)
        ids: list[int] = []
        positions: list[npt.NDArray[np.int32]] = []
        start = 0  # the next position
        for span in self._builder.spans(rendered, first=True):
            is_text = isinstance(span, TokenSpan)
            ids += span.ids if isinstance(span, TokenSpan) else [-1] * len(rows)
            n_new = len(ids) - sum(map(len, positions))
            counted = np.repeat(np.arange(n_new, dtype=np.int32)[:, None], 3, axis=1)
            at = counted if is_text or placed is None else placed
            positions.append(at + np.int32(start))
            start = int(positions[-1].max(initial=start - 1)) + 1
        kept = np.array(ids[:MAX_POSITIONS], np.int32)
        where = None if placed is None else np.concatenate(positions)[:MAX_POSITIONS]
        return Prompt(kept, rows[: int((kept < 0).sum())], where)
