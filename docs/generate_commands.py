"""Write docs/commands.md from the commands' own help: python docs/generate_commands.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from edge_vlm.cli.main import group

TARGET = Path(__file__).with_name("commands.md")


def commands_page() -> str:
    """The page's text."""
    parts = [
        "# Commands\n",
        "Written by `python docs/generate_commands.py`; a test compares it with the commands.\n",
        "The answer goes to stdout, everything else to stderr. Exit codes: 0, 1 for a failure,",
        "2 for bad usage or input, 130 when stopped with Ctrl-C, 143 with SIGTERM. Every option",
        "can also be set with an environment variable `EDGE_VLM_<COMMAND>_<OPTION>`:",
        "`EDGE_VLM_ASK_MAX_TOKENS=99`; in paths, `~` is your home there too.\n",
        "Control characters of answers reach a pipe, never a terminal; those of file names,",
        "bundles and errors are always written as escapes (`\\x1b`). What the locale's encoding",
        "lacks is written so too, and no answer is lost. `--json` is valid JSON in every locale.",
        "A closed stdin, stdout or stderr is `/dev/null`; a folder as stdin is refused by Python",
        "itself. Without a home that can be written, questions are answered without cache.\n",
    ]
    width = {"max_content_width": 96, "terminal_width": 96}
    root = click.Context(group, info_name="edge-vlm", **width, **group.context_settings)
    parts.append(_block("edge-vlm", group.get_help(root)))
    for name in group.list_commands(root):
        command = group.get_command(root, name)
        if command is None:
            continue
        parts += _blocks(f"edge-vlm {name}", command, root, width)
    return "\n".join(parts)


def _blocks(
    title: str, command: click.Command, parent: click.Context, width: dict[str, int]
) -> Iterator[str]:
    """A command's help, and that of the commands in it."""
    context = click.Context(command, info_name=title.split()[-1], parent=parent, **width)
    yield _block(title, command.get_help(context))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from _blocks(f"{title} {name}", command.commands[name], context, width)


def _block(title: str, text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return f"## {title}\n\n```\n{lines}\n```\n"


if __name__ == "__main__":
    if "--check" in sys.argv and TARGET.read_text(encoding="utf-8") != commands_page():
        sys.exit(f"docs/{TARGET.name} is old: run python docs/generate_commands.py")
    TARGET.write_text(commands_page(), encoding="utf-8")
