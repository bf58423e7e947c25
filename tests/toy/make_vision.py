"""Writes ``vision.onnx``, the arithmetic of ``tower.py`` as a graph.

python -m tests.toy.make_vision
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper, save

from tests.toy.sizes import HIDDEN, N_MARKERS, PROCESSOR
from tests.toy.tower import LAST, MARKERS, POOLING, PROJECTION

OPSET, IR_VERSION = 20, 10
PATH = Path(__file__).parent / "vision.onnx"


def vision_graph() -> ModelProto:
    """With the inputs and outputs that the runtime asks of jina-vlm's graph."""
    constants = {
        "projection": PROJECTION,
        "pooling": POOLING,
        "last": LAST,
        "markers": MARKERS,
        "axes": np.array([1, 2], np.int64),
    }
    nodes = [
        helper.make_node("MatMul", ["crops", "projection"], ["projected"]),
        helper.make_node("MatMul", ["pooling", "projected"], ["pooled"]),
        helper.make_node("Cast", ["is_last"], ["which"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["which", "axes"], ["which_3d"]),
        helper.make_node("Mul", ["which_3d", "last"], ["added"]),
        helper.make_node("Add", ["pooled", "added"], ["embeddings"]),
        helper.make_node("Identity", ["markers"], ["marker_embeddings"]),
    ]
    value, number = helper.make_tensor_value_info, TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "toy",
        [
            value("crops", number, ["n_crops", *PROCESSOR.crop_shape]),
            value("is_last", TensorProto.BOOL, ["n_crops"]),
        ],
        [
            value("embeddings", number, ["n_crops", PROCESSOR.tokens_per_crop, HIDDEN]),
            value("marker_embeddings", number, [N_MARKERS, HIDDEN]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    checker.check_model(model, full_check=True)
    return model


if __name__ == "__main__":
    save(vision_graph(), PATH)
