"""Which model a command uses, and the line that says so when nobody chose one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edge_vlm.families.base import ImageProcessor

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
            click.echo(DEMO_LINE, err=True)
    return model


def image_processor(model: str | None) -> ImageProcessor:
    """A model's image processor; a released one's needs no bundle.

    Raises:
        BundleError: there is no such bundle.
    """
    from edge_vlm.bundle.find import find_bundle
    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm.planning.models import released_models

    if model in released_models():
        return released_models()[model].processor
    return Bundle.open(find_bundle(pick_model(model))).manifest.image_processor
