"""Shapes that an answer may have."""
