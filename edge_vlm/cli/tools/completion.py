"""``edge-vlm completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from edge_vlm.cli.streams import write


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes edge-vlm's commands in a shell.

    \b
    edge-vlm completion bash >> ~/.bashrc
    edge-vlm completion fish > ~/.config/fish/completions/edge-vlm.fish
    """
    completion = get_completion_class(shell)
    if completion is None:  # all choices above are click's own
        raise click.UsageError(f"click knows no completion for {shell}")
    root = ctx.find_root().command
    write(completion(root, {}, "edge-vlm", "_EDGE_VLM_COMPLETE").source())
