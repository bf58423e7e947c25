"""The ``edge-vlm`` command: finds its subcommands, and ends every error in one line."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

import click

from edge_vlm import __version__
from edge_vlm.cli.interrupt import Terminated, terminating
from edge_vlm.cli.session import Session
from edge_vlm.cli.streams import prepare, say
from edge_vlm.plugins import load_plugin, plugins

GROUP = "edge_vlm.commands"  # entry points of other packages, each a click command
_BUILT_IN = {  # room and help, so that listing them imports none
    "ask": ("questions", "Answer a question about pictures."),
    "bench": ("tools", "Measure load, vision, prefill, decode and memory on this machine."),
    "cache": ("models", "Show, clear or find what is kept on disk of pictures."),
    "chat": ("questions", "Talk about pictures, one question after another."),
    "completion": ("tools", "Print the script that completes edge-vlm's commands in a shell."),
    "doctor": ("tools", "Show what this machine is and what would make it faster."),
    "info": ("models", "Show what a bundle is and whether its files are intact."),
    "plan": ("tools", "Show how a picture is tiled and what it costs, without running a model."),
    "tiles": ("questions", "Draw how a picture is cut into tiles."),
    "tune": ("tools", "Find the settings that are fastest on this machine, and keep them."),
    "use": ("models", "Choose the model that is used when none is named."),
    "verify": ("models", "Check a bundle, also against the checkpoint it was made from."),
    "watch": ("questions", "Answer about each new picture of a folder, a camera or a command."),
}
_HELP = {"export": "Turn a checkpoint into a bundle."}  # of the exporter, which comes along


class Commands(click.Group):
    """Built-in commands and those of the entry-point group; imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*_BUILT_IN, *plugins(GROUP)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _BUILT_IN:
            where = f"edge_vlm.cli.{_BUILT_IN[cmd_name][0]}.{cmd_name}:command"
        elif cmd_name in plugins(GROUP):
            where = plugins(GROUP)[cmd_name]
        else:
            return None
        command: click.Command = load_plugin(where)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them without importing any."""
        known = {name: text for name, (_, text) in _BUILT_IN.items()} | _HELP
        rows = [
            (name, known.get(name) or f"Of {plugins(GROUP)[name].split('.')[0]}.")
            for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "EDGE_VLM"},
)
@click.version_option(__version__, prog_name="edge-vlm")
def group() -> None:
    """Ask a real vision-language model about pictures. Nothing leaves this machine.

    \b
    edge-vlm ask photo.jpg "What is on the table?"
    edge-vlm plan 2728x2046 --model jina-vlm
    """


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run(group, "edge-vlm", args)


def run(command: click.Command, name: str, args: list[str] | None = None) -> NoReturn:
    """Run a command line; every error a user can cause ends in one line."""
    prepare()
    session = Session()
    try:
        try:
            with terminating():
                code = command.main(args, prog_name=name, standalone_mode=False, obj=session)
        finally:
            session.finish()
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        say(said.getvalue(), end="")
        raise SystemExit(error.exit_code) from None
    except Terminated:
        say("stopped")
        raise
    except (KeyboardInterrupt, click.Abort):
        say("stopped")
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader has gone; give the interpreter a stdout that it can flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        raise SystemExit(session.report(error)) from None
    raise SystemExit(code if isinstance(code, int) else 0)
