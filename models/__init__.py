"""Models that are made in this repository."""
