"""What commands use of the exporter: a package of its own, which names it in its entry points."""

from __future__ import annotations

from typing import Any

from edge_vlm.errors import InputError
from edge_vlm.plugins import load_plugin, plugins

GROUP = "edge_vlm.exporter"


def exporter(name: str, purpose: str) -> Any:
    """The exporter's function of that name.

    Raises:
        InputError: the exporter, or a library that it needs, is not installed.
    """
    try:
        return load_plugin(plugins(GROUP)[name])
    except (KeyError, ImportError) as error:
        missing = getattr(error, "name", None) or "the exporter"
        raise InputError(
            f"{purpose} needs {missing}; install with: pip install 'edge-vlm[export]'"
        ) from error
