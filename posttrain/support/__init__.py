"""Helpers that every other package may use. They import only the errors."""
