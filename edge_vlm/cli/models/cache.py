"""``edge-vlm cache``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from edge_vlm.cli.options import output_options, verbose_option
from edge_vlm.cli.streams import say, write, write_json, write_path
from edge_vlm.cli.table import echo_lines

if TYPE_CHECKING:
    from edge_vlm.machine.store import Store


@click.group("cache")
def command() -> None:
    """What is kept on disk of pictures, to answer the next question about them sooner.

    Derived data, not the pictures: embeddings of their tiles and the decoder's state behind them.
    EDGE_VLM_CACHE names the folder, or turns it off ('off'); EDGE_VLM_CACHE_SIZE limits it.
    """


@command.command("info")
@output_options
def info(as_json: bool) -> None:
    """Show the folder, its limit and what is in it."""
    store = _store()
    if store is None:
        write_json({"enabled": False}) if as_json else write("the cache is off")
        return
    found = store.info()
    if as_json:
        write_json({"enabled": True, **dataclasses.asdict(found)})
        return
    echo_lines(
        {
            "folder": found.folder,
            "used": f"{found.used_bytes / 1e6:.1f} MB of at most {found.limit_bytes / 1e6:.0f} MB",
            "tiles": f"{found.entries['tile']} ({found.bytes['tile'] / 1e6:.1f} MB)",
            "prefixes": f"{found.entries['prefix']} ({found.bytes['prefix'] / 1e6:.1f} MB)",
        },
        9,
    )


@command.command("clear")
@verbose_option
def clear() -> None:
    """Remove everything that is kept."""
    store = _store()
    if store is None:
        say("the cache is off")
        return
    before = store.clear()
    n_entries = sum(before.entries.values())
    say(f"removed {n_entries} entries, {before.used_bytes / 1e6:.1f} MB")


@command.command("path")
@verbose_option
def path() -> None:
    """Print the folder."""
    store = _store()
    if store is None:
        raise click.UsageError("the cache is off (EDGE_VLM_CACHE)")
    write_path(store.folder)


def _store() -> Store | None:
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.machine.store import open_store

    return open_store(MachineSettings.from_environment())
