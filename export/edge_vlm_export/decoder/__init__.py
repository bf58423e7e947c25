"""decoder.gguf: written, quantized, its importance matrix."""
