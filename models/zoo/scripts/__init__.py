"""Characters of the world's scripts, rendered from open fonts: an endless data set."""
