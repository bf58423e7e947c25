"""What commands use of the exporter: a package of its own, which names it in its entry points."""

from __future__ import annotations

from typing import Any

from edge_vlm.errors import InputError
from edge_vlm.plugins import load_plugin, plugins

GROUP = "edge_vlm.exporter"


def exporter(name: str, purpose: str) -> Any:
    """The exporter's function of that name.

    Raises:
        InputError: the exporter is not installed.
        click.UsageError: a library that it needs is not installed.
    """
    added = plugins(GROUP)
    if name not in added:
        raise InputError(f"{purpose} needs the exporter: pip install 'edge-vlm[export]'")
    load_plugin(added["require_extra"])(purpose)
    return load_plugin(added[name])
