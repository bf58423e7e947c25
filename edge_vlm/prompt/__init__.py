"""From words to token ids with gaps for pictures."""
