"""What a request costs in tokens, memory and seconds, and what to give up for less."""
