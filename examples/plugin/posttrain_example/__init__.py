"""An algorithm, a reward, a model and a data source, found by the entry points of this package."""
