"""The settings for sampling images of prompts: size, steps, guidance, solver, precision, seed."""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from pydantic import Field

from posttrain.flow.solvers import Solver
from posttrain.registry import Spec

MAX_SIDE = 16_384
"""The longest side in pixels that any recipe may ask for; a model's own limit is shorter."""


class Mark(enum.Enum):
    """What a field of a block is, as ``Annotated`` says beside its type."""

    GUIDANCE = enum.auto()
    """The guidance scale of images that are drawn. ``check`` asks the model whether it can take it."""


GUIDANCE = Mark.GUIDANCE


class Sampling(Spec):
    """How images are sampled."""

    resolution: int = Field(default=512, ge=8, le=MAX_SIDE)
    """Side of the square images, in pixels."""
    steps: int = Field(default=40, ge=1, le=10_000)
    """Sampling steps: forwards of the transformer, or twice as many with guidance."""
    guidance: Annotated[float, GUIDANCE] = Field(default=4.5, ge=0)
    """Guidance scale; 1 is none."""
    solver: Solver = "euler"
    """How the velocity is integrated: ``euler``, or DPM-Solver++ of order 1 or 2, ``dpm1`` and ``dpm2``
    (Lu et al. 2022, arXiv:2211.01095). Each step takes one velocity."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the transformer computes; with ``bf16`` its weights are bf16, too."""
    seed: int = 0
    """Seed of the noise, which is a function of seed, prompt and image number alone. All stages, on any
    number of processes, are sampled from the same noise."""
