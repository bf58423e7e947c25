"""``edge-vlm plan``."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import click

from edge_vlm.cli.options import (
    image_options,
    json_option,
    max_tiles_option,
    model_option,
    verbose_option,
)


@click.command("plan")
@click.argument("image", metavar="IMAGE_OR_WxH")
@model_option
@max_tiles_option
@image_options
@json_option
@verbose_option
def command(
    image: str,
    model: str | None,
    max_tiles: int | None,
    max_pixels: int | None,
    allow_format: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Show how a picture is tiled and what it costs, without running a model.

    '--model jina-vlm' plans with the released settings and needs no weights.

    \b
    edge-vlm plan photo.jpg
    edge-vlm plan 2728x2046 --model jina-vlm
    """
    del verbose  # main() looks for it
    from edge_vlm import released
    from edge_vlm.bundle import Bundle
    from edge_vlm.errors import ImageError
    from edge_vlm.folders import find_bundle
    from edge_vlm.image import load_image
    from edge_vlm.machine import MachineSettings
    from edge_vlm.plan import limit_tiles, plan_image

    if model == released.NAME:
        processor, decoder = released.IMAGE_PROCESSOR, released.DECODER
    else:
        manifest = Bundle.open(find_bundle(model)).manifest
        processor, decoder = manifest.image_processor, manifest.decoder

    size = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", image)
    if size and not Path(image).exists():
        width, height = int(size[1]), int(size[2])
        if not width or not height:
            raise ImageError(f"{image}: a picture has at least one pixel on each side")
    else:
        limit = MachineSettings.from_environment(max_pixels=max_pixels).max_pixels
        pixels = load_image(image, max_pixels=limit, extra_formats=allow_format)
        height, width = pixels.shape[:2]
    plan = plan_image(width, height, limit_tiles(processor, max_tiles), decoder)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(plan)))
        return
    reduced = ", reduced" if plan.reduced else ""
    for label, value in (
        ("size", f"{width}x{height}"),
        ("used at", f"{plan.resized[0]}x{plan.resized[1]}{reduced}"),
        ("tiling", f"{plan.tiling[0]}x{plan.tiling[1]}"),
        ("crops", f"{plan.crops} (the thumbnail included)"),
        ("image tokens", f"{plan.image_tokens}"),
        ("KV cache", f"{plan.kv_bytes / 1e6:.1f} MB (f16)"),
    ):
        click.echo(f"{label:<13} {value}")
