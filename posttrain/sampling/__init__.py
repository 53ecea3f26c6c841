"""Sampling images from a policy."""
