"""What installed packages add: entry points of a group, by name.

https://packaging.python.org/en/latest/specifications/entry-points/ - read here because
``importlib.metadata`` takes 60 ms for it beside a hundred packages, two thirds of what ``--help``
may take.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from edge_vlm.errors import InputError


@cache
def plugins(group: str) -> Mapping[str, str]:
    """``module:object`` of each entry point of the group; what comes first on the path counts."""
    found: dict[str, str] = {}
    for folder in sys.path:
        for path in sorted(Path(folder or ".").glob("*.dist-info/entry_points.txt")):
            text = path.read_text(encoding="utf-8", errors="replace")
            section = text.partition(f"[{group}]")[2].partition("[")[0]
            for line in section.splitlines():
                name, _, value = line.partition("=")
                if value:
                    found.setdefault(name.strip(), value.strip())
    return found


def exporter(value: str, what: str) -> Any:
    """``module:object`` of the exporter, which comes along, but not the libraries it needs.

    Raises:
        InputError: one of them is missing; ``what`` is what it is for.
    """
    try:
        return load_plugin(f"edge_vlm_export.{value}")
    except ImportError as error:
        raise InputError(
            f"{what} needs {error.name}; install with: pip install 'edge-vlm[export]'"
        ) from error


def load_plugin(value: str) -> Any:
    """The object that an entry point names."""
    module, _, name = value.partition(":")
    return getattr(import_module(module), name)
