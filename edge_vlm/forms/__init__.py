"""Shapes that an answer may have, and the one that ends it: a loop."""
