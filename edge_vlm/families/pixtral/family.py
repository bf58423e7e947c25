"""Pixtral for the runtime: its own of everything that a family supplies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from edge_vlm.families.base import Axes, Box, Family, Float32, Int32, Layout
from edge_vlm.families.pixtral import patches
from edge_vlm.families.pixtral.cost import picture_work
from edge_vlm.families.pixtral.processor import PixtralImageProcessor
from edge_vlm.families.pixtral.prompt import PixtralPrompt, PixtralTokens
from edge_vlm.families.pixtral.released import RELEASED

if TYPE_CHECKING:
    from edge_vlm.families.base import Released
    from edge_vlm.families.sizes import Vision, VisionWork


class Pixtral(Family):
    """A picture as a whole, of any size up to an edge; its rows are lines of tokens."""

    name = "pixtral"
    processor = PixtralImageProcessor
    tokens = PixtralTokens
    prompt = PixtralPrompt
    n_markers = 2  # behind a row, and behind the last one
    extras: ClassVar[dict[str, type[np.generic]]] = {"places": np.int64}
    extra_axes: ClassVar[dict[str, Axes]] = {"places": ("n_patches", 2)}
    # Angles, RMSNorm, and parts of a picture's rows.
    operators = frozenset({"Cos", "Sin", "Pow", "Shape"})

    layout = staticmethod(patches.plan_picture)
    cut = staticmethod(patches.cut_patches)
    largest = staticmethod(patches.largest_pictures)
    picture_work = staticmethod(picture_work)

    def rows(
        self, embeddings: Float32, markers: Float32, plan: Layout, processor: PixtralImageProcessor
    ) -> Float32:
        """See ``patches.lines``."""
        return patches.lines(embeddings[0], markers, plan)

    def block(self, plan: Layout, processor: PixtralImageProcessor, tokens: PixtralTokens) -> Int32:
        """[IMG] for each patch, [IMG_BREAK] behind a row, [IMG_END] behind the last."""
        rows, columns = plan.tiling
        ids = np.full((rows, columns + 1), tokens.image, np.int32)
        ids[:, columns] = tokens.image_break
        ids[-1, columns] = tokens.image_end
        return ids.ravel()

    def limited(self, processor: PixtralImageProcessor, max_tiles: int) -> PixtralImageProcessor:
        """At most so many tiles' patches."""
        most = min(max_tiles * processor.tokens_per_crop, processor.max_patches)
        return processor.model_copy(update={"max_patches": most})

    def boxes(
        self, plan: Layout, processor: PixtralImageProcessor
    ) -> Iterator[tuple[Box, Box, int]]:
        """The picture itself."""
        whole = (0.0, 0.0, 1.0, 1.0)
        yield whole, whole, plan.tile_tokens

    def work(self, processor: PixtralImageProcessor, vision: Vision) -> VisionWork:
        """Of a square tile, whatever the longest edge."""
        height, width = processor.tile_hw
        tile = processor.model_copy(
            update={"longest_edge": height, "max_patches": processor.tokens_per_crop}
        )
        return picture_work(patches.plan_picture(width, height, tile), processor, vision)

    def released(self) -> dict[str, Released]:
        """The one in transformers' layout."""
        return RELEASED

    def inputs(
        self, crops: Float32, processor: PixtralImageProcessor
    ) -> dict[str, npt.NDArray[Any]]:
        """As of square pictures, or of one row of patches."""
        n_patches = crops.shape[1]
        side = math.isqrt(n_patches)
        tiling = (side, side) if side * side == n_patches else (1, n_patches)
        return {"crops": crops, "places": np.repeat(patches.places_of(tiling), len(crops), 0)}


FAMILY = Pixtral()
