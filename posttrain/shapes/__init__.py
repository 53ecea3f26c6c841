"""The Shapes world: coloured shapes, their captions, and a judge that needs no network."""
