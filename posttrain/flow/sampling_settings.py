"""The settings by which images are drawn for prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.flow.solvers import Solver
from posttrain.registry import Spec


class Sampling(Spec):
    """How images are drawn for prompts."""

    resolution: int = Field(512, ge=8)
    """Side of the images, in pixels."""
    steps: int = Field(40, ge=1)
    """Sampling steps."""
    guidance: float = Field(4.5, ge=0)
    """Classifier-free guidance scale; 1 is none."""
    solver: Solver = "euler"
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the transformer's forward (bf16 is autocast)."""
    seed: int = 0
    """Of the noise, which belongs to the prompt: equal for every stage, on any number of processes."""
