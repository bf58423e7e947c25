"""From a checkpoint to a bundle that ``edge_vlm`` runs; no PyTorch involved.

Its rooms in the order data moves: ``checkpoint`` (what the files say), ``graph`` (ONNX),
``families`` (what differs between models), ``samples`` (pictures and questions), ``vision`` and
``decoder`` (the two model files), ``proof`` (how close they are), ``steps`` (the order of an
export), ``synthetic`` (random models), ``cli``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_vlm_export.steps.export import export_checkpoint

__all__ = ["export_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import on first use: help needs no more than click."""
    if name in __all__:
        from edge_vlm_export.steps import export

        return getattr(export, name)
    raise AttributeError(f"module 'edge_vlm_export' has no attribute {name!r}")
