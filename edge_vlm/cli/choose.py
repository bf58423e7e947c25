"""Which model and which picture a command uses, and the line where nobody chose a model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from edge_vlm.cli.streams import say

if TYPE_CHECKING:
    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm.families.base import ImageProcessor
    from edge_vlm.pictures.image import UInt8

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


def read_picture(source: Any, max_pixels: int | None, formats: tuple[str, ...]) -> UInt8:
    """Pixels (h, w, 3) of a file or of bytes, as ``image_options`` allow.

    Raises:
        ImageError: it cannot be read.
    """
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.pictures.image import load_image

    limit = MachineSettings.from_environment(max_pixels=max_pixels).max_pixels
    return load_image(source, max_pixels=limit, extra_formats=formats)
