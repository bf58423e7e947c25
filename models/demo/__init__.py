"""The demo model: its synthetic data, its training and its evaluation."""
