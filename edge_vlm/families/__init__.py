"""What differs between models: one folder a family, and what each of them supplies."""
