"""A model on disk: the manifest, its files and how they are found and checked."""
