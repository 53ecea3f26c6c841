"""The strategies by which one training run uses several processes, one per file."""
