"""What differs between models: one folder a family."""
