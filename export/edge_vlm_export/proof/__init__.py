"""How close the written files are to the checkpoint."""
