"""Plans: the memory, time and disk that a recipe needs, counted before anything is bought or run."""
