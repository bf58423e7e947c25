"""A toy family whose pictures have M-RoPE's three positions a row, and how a test installs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np

from edge_vlm.families.base import GROUP, Int32, find_family
from edge_vlm.families.jina_vlm.family import JinaVLM
from edge_vlm.families.jina_vlm.tiling import JinaImageProcessor, TilingPlan
from edge_vlm.plugins import plugins


class Processor(JinaImageProcessor):
    """As the toy model's."""

    family: ClassVar[str] = "toy-mrope"


class ToyMRope(JinaVLM):
    """jina-vlm, whose rows stand in a grid: row by row, ``width`` side by side."""

    name = "toy-mrope"
    processor = Processor
    width: ClassVar[int] = 8

    def positions(self, plan: TilingPlan, processor: JinaImageProcessor) -> Int32:
        """All at one time."""
        height, width = np.divmod(np.arange(plan.n_tokens, dtype=np.int32), self.width)
        return np.stack([np.zeros_like(width), height, width], axis=1)


class NarrowProcessor(JinaImageProcessor):
    """The same settings."""

    family: ClassVar[str] = "toy-narrow"


class ToyNarrow(ToyMRope):
    """The same rows at other positions."""

    name = "toy-narrow"
    processor = NarrowProcessor
    width = 5


FAMILY = ToyMRope()
NARROW = ToyNarrow()


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """While both families are those of a package in ``folder``."""
    info = folder / "toy_mrope-1.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text(
        f"[{GROUP}]\n{FAMILY.name} = {__name__}:FAMILY\n{NARROW.name} = {__name__}:NARROW\n"
    )
    sys.path.insert(0, str(folder))
    plugins.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        plugins.cache_clear()
        find_family.cache_clear()
