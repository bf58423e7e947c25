"""``edge-vlm tiles``."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import click

from edge_vlm.cli.options import (
    UserPath,
    crop_option,
    image_options,
    max_tiles_option,
    model_option,
    verbose_option,
)
from edge_vlm.cli.questions.words import as_path
from edge_vlm.cli.streams import write_bytes

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@click.command("tiles")
@click.argument("image", metavar="IMAGE")
@click.option(
    "--output",
    "-o",
    required=True,
    type=UserPath(dir_okay=False, path_type=Path),
    help="Picture to write: .png, .jpg or .webp; '-' writes PNG to stdout.",
)
@model_option
@max_tiles_option
@crop_option
@image_options
@verbose_option
def command(
    image: str,
    output: Path,
    model: str | None,
    max_tiles: int | None,
    max_pixels: int | None,
    allow_format: tuple[str, ...],
    **reading: Any,
) -> None:
    """Draw how IMAGE is cut into tiles, with the image tokens of each part.

    '-' reads the picture from stdin; '--model jina-vlm' draws with the released settings and needs
    no weights.

    \b
    edge-vlm tiles photo.jpg -o tiles.png
    edge-vlm tiles page.png --model jina-vlm --max-tiles 6 -o tiles.png
    """
    from edge_vlm.cli.choose import image_processor, picture_source, read_picture
    from edge_vlm.machine.folders import write_file
    from edge_vlm.pictures.overview import draw_tiling
    from edge_vlm.planning.budget import limit_tiles

    to_stdout = str(output) == "-"
    kind = "PNG" if to_stdout else _FORMATS.get(output.suffix.lower())
    if kind is None:
        raise click.UsageError(f"--output: {output}: the name must end in {', '.join(_FORMATS)}")
    if to_stdout and sys.stdout.isatty():
        raise click.UsageError("--output: stdout is a terminal; give a file or a pipe")
    pixels = read_picture(picture_source(as_path(image)), max_pixels, allow_format, **reading)
    drawing = draw_tiling(pixels, limit_tiles(image_processor(model), max_tiles))
    data = io.BytesIO()
    drawing.save(data, kind)
    if to_stdout:
        write_bytes(data.getvalue())
    else:
        write_file(output, data.getvalue())
