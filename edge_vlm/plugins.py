"""What installed packages add: entry points of a group, by name.

https://packaging.python.org/en/latest/specifications/entry-points/ - read here because
``importlib.metadata`` takes 60 ms for it beside a hundred packages, two thirds of what ``--help``
may take.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from glob import escape, glob
from importlib import import_module
from typing import Any


@cache
def plugins(group: str) -> Mapping[str, str]:
    """``module:object`` of each entry point of the group; what comes first on the path counts."""
    found: dict[str, str] = {}
    for folder in sys.path:
        pattern = os.path.join(escape(folder or "."), "*.dist-info", "entry_points.txt")
        for path in sorted(glob(pattern)):
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
            section = text.partition(f"[{group}]")[2].partition("[")[0]
            for line in section.splitlines():
                name, _, value = line.partition("=")
                if value:
                    found.setdefault(name.strip(), value.strip())
    return found


def load_plugin(value: str) -> Any:
    """The object that an entry point names."""
    module, _, name = value.partition(":")
    return getattr(import_module(module), name)
