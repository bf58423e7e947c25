"""Timing and checking: bench, tune, doctor."""
