"""``edge-vlm-export synthesize``: a random checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_vlm.cli.display import Steps
from edge_vlm.cli.options import FILE, UserPath, verbose_option
from edge_vlm.cli.streams import say


@click.command("synthesize")
@click.option(
    "--config",
    default="jina-vlm",
    show_default=True,
    type=FILE,
    metavar="NAME_OR_FOLDER",
    help="jina-vlm, internvl2.5-1b, demo, or a folder with a checkpoint's settings files.",
)
@click.option("--out", required=True, type=UserPath(path_type=Path), help="Folder to write.")
@click.option("--layers", type=click.IntRange(1), help="Decoder layers, if not the config's.")
@click.option(
    "--vision-layers", type=click.IntRange(1), help="Layers of the vision tower, likewise."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@verbose_option
def command(config: str, out: Path, **options: Any) -> None:
    """Write a random checkpoint in the released layout and size.

    With jina-vlm: 2.4 billion bfloat16 numbers, 5 GB, a few minutes. Its answers mean nothing; its
    export and its speed are those of the real model.

    \b
    edge-vlm-export synthesize --out ./random
    edge-vlm export ./random --out ./random-bundle
    """
    from edge_vlm_export.synthetic.checkpoint import synthesize

    with Steps() as steps:
        folder = synthesize(config, out, **options, progress=steps.show)
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f"{folder}: {size / 1e6:.1f} MB")
