"""The ``edge-vlm`` command. Each subcommand is a module, imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import NoReturn

import click

from edge_vlm import __version__
from edge_vlm.cli.notes import notes
from edge_vlm.errors import EdgeVLMError

_COMMANDS = {
    "ask": "Answer a question about pictures.",
    "cache": "Show, clear or find what is kept on disk of pictures.",
    "bench": "Measure load, vision, prefill, decode and memory on this machine.",
    "chat": "Talk about pictures, one question after another.",
    "completion": "Print the script that completes edge-vlm's commands in a shell.",
    "doctor": "Show what this machine is and what would make it faster.",
    "export": "Turn a jina-vlm checkpoint into a bundle.",
    "info": "Show what a bundle is and whether its files are intact.",
    "plan": "Show how a picture is tiled and what it costs, without running a model.",
    "tiles": "Draw how a picture is cut into tiles.",
    "tune": "Find the settings that are fastest on this machine, and keep them.",
    "verify": "Check a bundle, also against the checkpoint it was made from.",
    "use": "Choose the model that is used when none is named.",
    "watch": "Answer about each new picture of a folder, a camera or a command.",
}


_MODULES = {
    "ask": "edge_vlm.cli.questions.ask",
    "bench": "edge_vlm.cli.tools.bench",
    "cache": "edge_vlm.cli.models.cache",
    "chat": "edge_vlm.cli.questions.chat",
    "completion": "edge_vlm.cli.tools.completion",
    "doctor": "edge_vlm.cli.tools.doctor",
    "info": "edge_vlm.cli.models.info",
    "plan": "edge_vlm.cli.tools.plan",
    "tiles": "edge_vlm.cli.questions.tiles",
    "tune": "edge_vlm.cli.tools.tune",
    "use": "edge_vlm.cli.models.use",
    "verify": "edge_vlm.cli.models.verify",
    "watch": "edge_vlm.cli.questions.watch",
    "export": "edge_vlm_export.cli.export",
}


class _Commands(click.Group):
    """Lists commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = _MODULES[cmd_name]
        command: click.Command = importlib.import_module(module).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(
    cls=_Commands,
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
    arguments = sys.argv[1:] if args is None else args
    verbose = bool({"-v", "--verbose"} & set(arguments))
    try:
        with notes(verbose):
            code = command.main(arguments, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except EdgeVLMError as error:
        _fail(error, verbose, error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader has gone; give the interpreter a stdout that it can flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except MemoryError as error:
        _fail(EdgeVLMError("not enough memory"), verbose, 1, error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(EdgeVLMError(f"{where}{error.strerror or error}"), verbose, 1, error)
    except Exception as error:
        hint = "" if verbose else "; run again with -v for the details and please report it"
        _fail(EdgeVLMError(f"unexpected {type(error).__name__}: {error}{hint}"), verbose, 1, error)
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(
    error: EdgeVLMError, verbose: bool, code: int, cause: BaseException | None = None
) -> NoReturn:
    if verbose:
        details = cause or error.__cause__
        if details:
            click.echo("".join(traceback.format_exception(details)), err=True, nl=False)
    message = " ".join(str(error).split())
    click.echo(f"{click.style('Error:', fg='red')} {message}", err=True)
    raise SystemExit(code)
