"""vision.onnx: calibrated, quantized within a budget, written, measured."""
