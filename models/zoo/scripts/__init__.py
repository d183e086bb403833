"""Characters of the world's scripts, rendered from open fonts: a data set without an end."""
