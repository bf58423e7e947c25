"""From a jina-vlm checkpoint to a bundle that ``edge_vlm`` runs; no PyTorch involved.

Read in the order data moves: ``config`` and ``tokenizer`` (what the JSON files say), ``checkpoint``
(the tensors), ``vision`` and ``decoder`` (the two model files), ``manifest``, and ``export``, which
orders these steps and puts the finished bundle in its place.
"""

from edge_vlm_export.steps.export import export_checkpoint

__all__ = ["export_checkpoint"]
