"""What is encoded once and kept: prompts and images, in files that stages, runs and processes share."""
