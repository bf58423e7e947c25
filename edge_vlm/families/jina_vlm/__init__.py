"""jina-vlm: overlapping tiles and a thumbnail, SigLIP2, attention pooling, Qwen3."""
