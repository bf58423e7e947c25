"""Pixtral: pictures as they are, a line of tokens for each row of patches."""
