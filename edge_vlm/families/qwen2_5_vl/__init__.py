"""Qwen2.5-VL: pictures of any size, windows in the tower, M-RoPE in the decoder."""
