"""Running a recipe: the chain of stages, one stage, and the artifacts it writes."""
