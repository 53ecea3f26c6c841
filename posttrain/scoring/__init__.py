"""Scoring images by rewards: beside training, from files, and behind an HTTP server."""
