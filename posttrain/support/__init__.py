"""Small helpers that every other package may use; they import nothing but the errors."""
