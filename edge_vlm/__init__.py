"""Ask a vision-language model about pictures, on this machine.

>>> from edge_vlm import EdgeVLM
>>> with EdgeVLM.load() as vlm:
...     print(vlm.ask("receipt.jpg", "What is the total?"))  # doctest: +SKIP

In reading order, each a sub-package: ``pictures`` (file to embeddings, cut and laid out by
``families``), ``prompt`` (words to ids), ``decoder`` (ids and embeddings to logits), ``forms``
(shapes of answers), ``answering`` (turns, and the public face).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_vlm.answering.answer import Answer, AskOptions, Timings
    from edge_vlm.answering.asynchronous import AsyncChat, AsyncEdgeVLM, AsyncStream
    from edge_vlm.answering.model import Chat, EdgeVLM, Stream
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
    from edge_vlm.machine.settings import MachineSettings
    from edge_vlm.pictures.picture import EncodedImage, ImageUse
    from edge_vlm.progress import CancelToken, Progress

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AskOptions",
    "AsyncChat",
    "AsyncEdgeVLM",
    "AsyncStream",
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
    "answering.answer": ("Answer", "AskOptions", "Timings"),
    "answering.asynchronous": ("AsyncChat", "AsyncEdgeVLM", "AsyncStream"),
    "answering.model": ("Chat", "EdgeVLM", "Stream"),
    "machine.settings": ("MachineSettings",),
    "pictures.picture": ("EncodedImage", "ImageUse"),
    "progress": ("CancelToken", "Progress"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``import edge_vlm`` alone loads neither numpy nor an engine."""
    if name in __all__:
        module = next((m for m, names in _MODULES.items() if name in names), "errors")
        return getattr(importlib.import_module(f"edge_vlm.{module}"), name)
    raise AttributeError(f"module 'edge_vlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
