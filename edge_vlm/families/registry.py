"""The families that are installed, by name.

Another package adds one with an entry point of the group ``edge_vlm.families`` whose name is the
family's and whose object is a ``Family``.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from edge_vlm.errors import InputError
from edge_vlm.machine.plugins import load_plugin, plugins

if TYPE_CHECKING:
    from edge_vlm.families.base import Family, ImageProcessor

GROUP = "edge_vlm.families"
DEFAULT = "jina-vlm"  # of bundles that were made when there was no other
_BUILT_IN = {
    "jina-vlm": "edge_vlm.families.jina_vlm.family",
    "llava-onevision": "edge_vlm.families.llava_onevision.family",
}


def family_names() -> list[str]:
    """Names that ``find_family`` knows."""
    return sorted({*_BUILT_IN, *plugins(GROUP)})


@cache
def find_family(name: str) -> Family:
    """The family of that name.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    if name in _BUILT_IN:
        found: Family = import_module(_BUILT_IN[name]).FAMILY
        return found
    if name in plugins(GROUP):
        added: Family = load_plugin(plugins(GROUP)[name])
        return added
    raise InputError(f"family {name[:100]!r} is none of {', '.join(family_names())}")


def family_of(processor: ImageProcessor) -> Family:
    """The family whose image processor this is."""
    return find_family(processor.family)
