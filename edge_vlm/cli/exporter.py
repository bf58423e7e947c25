"""What commands use of the exporter: a package of its own, which names it in its entry points."""

from __future__ import annotations

from typing import Any

from edge_vlm.errors import InputError
from edge_vlm.plugins import load_plugin, plugins

GROUP = "edge_vlm.exporter"


def exporter(name: str, purpose: str) -> Any:
    """The exporter's function of that name.

    Raises:
        InputError: the exporter is not installed, or by an earlier version of this package.
        click.UsageError: a library that it needs is not installed.
    """
    added = plugins(GROUP)
    if not added:
        raise InputError(f"{purpose} needs the exporter: pip install 'edge-vlm[export]'")
    if missing := [wanted for wanted in ("require_extra", name) if wanted not in added]:
        raise InputError(
            f"{purpose}: the installed edge-vlm is of an earlier version and names no"
            f" {missing[0]}; reinstall it: pip install 'edge-vlm[export]', in a clone"
            " pip install -e '.[export]'"
        )
    load_plugin(added["require_extra"])(purpose)
    return load_plugin(added[name])
