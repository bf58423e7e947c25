"""Qwen2.5-VL for the exporter."""
