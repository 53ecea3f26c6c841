"""The trained model: its velocity, the roles of its weights, and what is tuned."""

from posttrain.policy.policy import Policy

__all__ = ["Policy"]
