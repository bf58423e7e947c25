"""Turns of a conversation, and the public face."""
