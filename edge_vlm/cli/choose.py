"""Which model and which picture a command uses, and the line where nobody chose a model."""

from __future__ import annotations

import codecs
import os
from typing import TYPE_CHECKING, Any

from edge_vlm.cli.streams import say

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm.families.base import ImageProcessor
    from edge_vlm.pictures.image import UInt8
    from edge_vlm.pictures.picture import ImageUse

DEMO_LINE = (
    "Using the built-in demo model, which knows drawn pictures only ('edge-vlm use demo' hides"
    " this line). For jina-vlm: edge-vlm export jinaai/jina-vlm --out ./jina-vlm"
    " && edge-vlm use ./jina-vlm"
)


def pick_model(model: str | None) -> str | None:
    """``--model`` as given; without one, and without a chosen one, say on stderr what is used."""
    if not model and not os.environ.get("EDGE_VLM_MODEL"):
        from edge_vlm.bundle.find import chosen_model

        if chosen_model() is None:
            say(DEMO_LINE)
    return model


def open_bundle(model: str | None) -> Bundle:
    """The bundle that ``--model`` names, or else the chosen one.

    Raises:
        BundleError: there is no such bundle, or it is damaged.
    """
    from edge_vlm.bundle.find import find_bundle
    from edge_vlm.bundle.manifest import Bundle

    return Bundle.open(find_bundle(model))


def image_processor(model: str | None) -> ImageProcessor:
    """A model's image processor; a released one's needs no bundle.

    Raises:
        BundleError: there is no such bundle.
    """
    from edge_vlm.planning.models import released_models

    if model in released_models():
        return released_models()[model].processor
    return open_bundle(pick_model(model)).manifest.image_processor


def picture_source(name: str) -> str | bytes:
    """A picture as it is given on: a name, or all that comes from ``-`` or through a pipe.

    Raises:
        ImageError: the pipe cannot be read, holds too much, or nothing comes.
    """
    from edge_vlm.pictures.sources import is_pipe, read_pipe

    if name != "-" and not is_pipe(name):
        return name
    return read_pipe(name).removeprefix(codecs.BOM_UTF8)  # which some shells put in front


def read_picture(
    source: Any, max_pixels: int | None, formats: tuple[str, ...], crop: Any = None, **how: Any
) -> UInt8:
    """Pixels (h, w, 3) of a file or of bytes, as ``image_options`` and ``--crop`` allow.

    Raises:
        ImageError: it cannot be read.
    """
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.pictures.image import Cropped, open_image
    from edge_vlm.pictures.sources import each_part

    how |= {"max_pixels": max_pixels, "image_formats": tuple(formats) or None}
    settings = MachineSettings.from_environment(**how)
    parts = [one if crop is None else Cropped(one, crop) for one in each_part(source)]
    pixels, *_ = (open_image(one, settings).pixels for one in parts)
    return pixels


class LostDetail:
    """Says once of each picture that less than half of its width is used."""

    def __init__(self) -> None:
        self._said: set[tuple[int, int]] = set()

    def note(self, images: Iterable[ImageUse]) -> None:
        """Look at the pictures of an answer."""
        for image in images:
            if image.loses_detail and image.size not in self._said:
                self._said.add(image.size)
                used, size = ("x".join(map(str, side)) for side in (image.used, image.size))
                line = f"used at {used} of {size}: small print may be lost"
                say(f"{line}; try --crop or --max-tiles")
