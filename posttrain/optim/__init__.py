"""The optimizer, its settings and the learning-rate schedule."""
