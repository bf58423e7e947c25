"""``vision.onnx``: vision tower and connector as one graph, from crops to decoder-ready vectors.

Contract (``n_crops`` is dynamic, everything else fixed by the checkpoint):

* ``crops`` float32 (n_crops, n_patches, patch_values), and the family's other inputs (n_crops,)
  or of the axes that it names; where a crop has any size, it is one, and ``n_patches`` is dynamic
* ``embeddings`` float32 (n_crops, tokens_per_crop, hidden): the connector's output, plus a row of
  the decoder's token table where the family adds one
* ``marker_embeddings`` float32 (n_markers, hidden): vectors that no crop decides, if there are any

Two inner values have stable names, for tests and for the curious: ``vit_features``, what the
connector reads, and ``image_features``, its output before a row is added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper

from edge_vlm_export.graph.architecture import CROPS
from edge_vlm_export.graph.layers import Layers

if TYPE_CHECKING:
    from edge_vlm_export.families.opened import Model
    from edge_vlm_export.graph.onnx_graph import Graph
    from edge_vlm_export.graph.precision import Recipe

PRODUCER = "edge-vlm"


def build_vision(model: Model, recipe: Recipe) -> Graph:
    """The graph of ``vision.onnx``; the checkpoint's tensors are read when it is saved."""
    tower = model.tower
    if model.settings.image_processor.any_size:
        recipe = replace(recipe, batch=1)
    layers = Layers(tower.linears, model.tensors, recipe)
    g = layers.graph
    declare(layers, model, (CROPS, *model.family.runtime.extras))
    for stage in tower.stages:
        stage.add(layers)
    features = tower.stages[-1].writes
    shape = (layers.n_crops, *tower.stages[-1].shape)
    g.mark(features, shape)
    added = model.added_row()
    if added is None:
        g.op("Identity", "embeddings", features)
    else:
        name, row = added
        g.op("Add", "embeddings", features, g.weight(name, row.shape, row.read))
    g.output("embeddings", shape)
    markers = model.markers()
    if markers is not None:
        rows = g.weight("markers", markers.shape, markers.read)
        g.op("Identity", "marker_embeddings", rows)
        g.output("marker_embeddings", markers.shape)
    return g


def declare(layers: Layers, model: Model, names: Iterable[str]) -> None:
    """Make values the inputs of a graph."""
    family = model.family.runtime
    for name in names:
        kind, axes = TensorProto.FLOAT, model.tower.shape_of(name)
        if name in family.extras:
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(family.extras[name]))
            axes = family.extra_axes.get(name, ())
        layers.input(name, axes, kind)
