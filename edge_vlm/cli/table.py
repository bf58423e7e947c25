"""Tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_vlm.cli.streams import write


def echo_lines(lines: Mapping[str, object], width: int) -> None:
    """Print a line for each label and its value, which begins behind ``width`` characters."""
    for label, value in lines.items():
        write(f"{label:<{width}} {value}")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    columns = []
    for index, column in enumerate(zip(header, *rows, strict=True)):
        width = max(map(len, column))
        columns.append([c.rjust(width) if index else c.ljust(width) for c in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))
