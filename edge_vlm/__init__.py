"""Ask a vision-language model about pictures, on this machine.

>>> from edge_vlm import EdgeVLM
>>> with EdgeVLM.load() as vlm:
...     print(vlm.ask("receipt.jpg", "What is the total?"))  # doctest: +SKIP

In reading order: ``image`` (file to pixels), ``tiling`` (pixels to crops), ``vision`` (crops to
embeddings), ``stitch`` (embeddings to decoder input), ``prompt`` (conversation to tokens),
``decoder`` (tokens and embeddings to logits), ``generate`` (logits to text), ``conversation`` (all
of it in turns), ``model``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_vlm.answer import Answer, ImageUse, Progress, Timings
    from edge_vlm.cancel import CancelToken
    from edge_vlm.errors import (
        BudgetError,
        BundleError,
        Cancelled,
        CheckpointError,
        DecoderError,
        EdgeVLMError,
        ImageError,
        InputError,
        PromptError,
        VisionError,
    )
    from edge_vlm.machine import MachineSettings
    from edge_vlm.model import Chat, EdgeVLM, Stream
    from edge_vlm.options import AskOptions
    from edge_vlm.picture import EncodedImage

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AskOptions",
    "BudgetError",
    "BundleError",
    "CancelToken",
    "Cancelled",
    "Chat",
    "CheckpointError",
    "DecoderError",
    "EdgeVLM",
    "EdgeVLMError",
    "EncodedImage",
    "ImageError",
    "ImageUse",
    "InputError",
    "MachineSettings",
    "Progress",
    "PromptError",
    "Stream",
    "Timings",
    "VisionError",
    "__version__",
]

_MODULES = {
    "answer": ("Answer", "ImageUse", "Progress", "Timings"),
    "cancel": ("CancelToken",),
    "machine": ("MachineSettings",),
    "model": ("Chat", "EdgeVLM", "Stream"),
    "options": ("AskOptions",),
    "picture": ("EncodedImage",),
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``import edge_vlm`` alone loads neither numpy nor an engine."""
    if name in __all__:
        module = next((m for m, names in _MODULES.items() if name in names), "errors")
        return getattr(importlib.import_module(f"edge_vlm.{module}"), name)
    raise AttributeError(f"module 'edge_vlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
