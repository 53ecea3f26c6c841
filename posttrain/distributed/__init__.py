"""The processes of a run: how they start, know their rank, and exchange values."""
