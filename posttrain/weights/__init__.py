"""Published weight files: where they come from, whether they are here, and how they are read."""
