"""Random checkpoints and bundles in the released layout."""
