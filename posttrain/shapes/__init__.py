"""Shapes: a data set of rendered coloured shapes with captions, and a detector that needs no network."""
