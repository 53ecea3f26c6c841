"""The cache of encoded prompts and images, on disk, shared by stages, runs and processes."""
