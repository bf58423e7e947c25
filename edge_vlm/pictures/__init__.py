"""From a file to embeddings: pixels, crops, the vision tower, tiles seen before."""
