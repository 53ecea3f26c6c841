"""Translates another trainer's command line or configuration into a recipe (``posttrain import-flags``)."""
