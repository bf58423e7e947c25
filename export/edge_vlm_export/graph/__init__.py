"""ONNX graphs: nodes, weights, matrix products in every precision."""
