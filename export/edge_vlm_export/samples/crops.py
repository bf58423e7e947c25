"""Tiles to calibrate and measure with, cut from drawn pictures or from those of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import InputError
from edge_vlm.pictures.image import load_image
from edge_vlm_export.samples.conversations import BUILTIN, read_samples
from edge_vlm_export.samples.drawn import drawn_pictures

if TYPE_CHECKING:
    from edge_vlm.families.base import Tiles
    from edge_vlm_export.checkpoint.tensors import Float32
    from edge_vlm_export.families.opened import Description

QUICK_TILES = 2  # measured with when no calibration was asked for
CALIBRATION_TILES = 16

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CalibrationTiles:
    """Crops of several pictures."""

    crops: Float32  # (n, n_patches, patch_values), none of them blank
    extras: Mapping[str, npt.NDArray[Any]]  # (n,) each, as in the picture each crop comes from

    @property
    def feed(self) -> dict[str, npt.NDArray[Any]]:
        """All inputs of the graph."""
        return {"crops": self.crops, **self.extras}

    def first(self, n: int) -> CalibrationTiles:
        """At most ``n`` of them."""
        extras = {name: values[:n] for name, values in self.extras.items()}
        return CalibrationTiles(self.crops[:n], extras)

    def __len__(self) -> int:
        return len(self.crops)


def chosen_tiles(calibrate: str | Path | None, model: Description) -> CalibrationTiles:
    """``calibration_tiles``, as many as an export uses with this choice of ``calibrate``."""
    limit = CALIBRATION_TILES if calibrate else QUICK_TILES
    return calibration_tiles(calibrate or BUILTIN, model, limit)


def calibration_tiles(source: str | Path, model: Description, limit: int) -> CalibrationTiles:
    """Up to ``limit`` tiles of the pictures in a folder, or of drawn ones (``builtin``).

    Pictures take turns, so that few tiles still show many of them: first the first crop of each,
    then the next of each, and so on.

    Raises:
        InputError: see ``read_samples``.
        ImageError: a picture cannot be read.
    """
    if str(source) == BUILTIN:
        return cut_pictures(drawn_pictures(), model, limit)
    return cut_pictures((load_image(s.picture) for s in read_samples(source)), model, limit)


def cut_pictures(pictures: Iterable[UInt8], model: Description, limit: int) -> CalibrationTiles:
    """Up to ``limit`` tiles of pictures (height, width, 3), taken in turns, blank ones left out.

    Raises:
        InputError: no tile is left.
    """
    family, processor = model.family, model.settings.image_processor
    turns: list[list[tuple[Tiles, int]]] = []
    for picture in pictures:
        tiles = family.sample(picture, processor)
        useful = [index for index, crop in enumerate(tiles.crops) if not family.is_blank(crop)]
        # No picture can have more turns than the whole is to have tiles.
        for turn, index in enumerate(useful[:limit]):
            if turn == len(turns):
                turns.append([])
            if sum(map(len, turns[: turn + 1])) < limit:
                turns[turn].append((tiles, index))
        if turns and len(turns[0]) >= limit:
            break
    chosen = [tile for turn in turns for tile in turn][:limit]
    if not chosen:
        raise InputError("calibration: every tile of the pictures is black")
    names = family.runtime.extras
    return CalibrationTiles(
        np.stack([tiles.crops[index] for tiles, index in chosen]),
        {name: np.stack([tiles.extras[name][index] for tiles, index in chosen]) for name in names},
    )
