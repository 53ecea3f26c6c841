"""The processes of a run: how they are started, found, and how they exchange values."""
