"""Recipes: the schema, reading a file with line numbers, and checks before anything is loaded."""
