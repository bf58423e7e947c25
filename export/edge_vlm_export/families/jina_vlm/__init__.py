"""jina-vlm: its config, tensors, tower graph, decoder and reference."""
