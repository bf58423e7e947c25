"""``edge-vlm-export``: tools around checkpoints, beside ``edge-vlm export``."""

from __future__ import annotations

from typing import NoReturn

import click

from edge_vlm import __version__
from edge_vlm.cli.main import run
from edge_vlm_export.cli import synthesize


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge-vlm-export")
def group() -> None:
    """Tools around checkpoints; a bundle is made by `edge-vlm export`."""


group.add_command(synthesize.command)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run(group, "edge-vlm-export", args)
