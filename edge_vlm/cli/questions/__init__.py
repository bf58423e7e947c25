"""Commands that look at pictures: ask, chat, watch, tiles."""
