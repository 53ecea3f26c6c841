"""The policy: the trained model with its roles, and which of its weights are trained."""

from posttrain.policy.policy import Policy

__all__ = ["Policy"]
