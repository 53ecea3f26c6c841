"""The toy model of the laws, and what trains it; it comes with posttrain.testing."""

from posttrain.testing.toys import (
    Seeing,
    ToyModel,
    alone,
    collected,
    gradient,
    online_batch,
    toy_batch,
    toy_judge,
    toy_policy,
)

__all__ = [
    "Seeing", "ToyModel", "alone", "collected", "gradient", "online_batch", "toy_batch", "toy_judge", "toy_policy",
]  # fmt: skip
