"""Recipes: their schema, reading them from files with line numbers, and checks before a weight is loaded."""
