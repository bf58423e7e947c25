"""``edge-vlm use``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edge_vlm.cli.options import verbose_option
from edge_vlm.cli.streams import say, write_path


@click.command("use")
@click.argument("model", required=False, metavar="PATH_OR_NAME")
@click.option("--reset", is_flag=True, help="Forget the choice.")
@verbose_option
def command(model: str | None, reset: bool) -> None:
    """Choose the model that commands and EdgeVLM.load() use when none is named.

    --model and EDGE_VLM_MODEL go before the choice. Without an argument the choice is shown, and
    the names of the models that are installed.

    \b
    edge-vlm use ./jina-vlm-bundle
    edge-vlm use demo
    """
    from edge_vlm.bundle.find import (
        CHOICE_NAME,
        EMBEDDED,
        chosen_model,
        find_bundle,
        installed_names,
    )
    from edge_vlm.bundle.manifest import Bundle
    from edge_vlm.errors import label
    from edge_vlm.machine.folders import config_folder, write_file

    if reset and model:
        raise click.UsageError("give a model or --reset, not both")
    if not reset and not model:
        write_path(chosen_model() or EMBEDDED)
        say(f"installed: {', '.join(installed_names())}")
        return
    choice = config_folder() / CHOICE_NAME
    if reset:
        choice.unlink(missing_ok=True)
    elif model:
        folder = find_bundle(model)
        bundle = Bundle.open(folder)
        stored = str(folder.resolve()) if folder == Path(model) else model
        choice.parent.mkdir(parents=True, exist_ok=True)
        write_file(choice, json.dumps({"model": stored}).encode())
        say(f"{bundle.name}, in {label(folder)}")
