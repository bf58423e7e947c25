"""The kinds of pictures: each module draws one kind and asks about it."""
