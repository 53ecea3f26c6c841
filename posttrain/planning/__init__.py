"""What will a recipe need, on which machine, and for how long? Counted before anything is bought or run."""
