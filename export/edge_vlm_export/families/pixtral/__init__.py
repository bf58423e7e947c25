"""Pixtral's half for the exporter."""
