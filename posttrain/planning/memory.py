"""How much memory does training need on each device, by part, for a way of spreading it over several?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

StrategyName = Literal["single", "ddp", "fsdp2", "deepspeed"]
ADAMW_BYTES = 8.0
"""AdamW's two float32 moments of a trained number."""
ADAMW8BIT_BYTES = 2.06
"""The same in 8 bits, with a float32 scale for each 256 of them."""


@dataclass(frozen=True)
class Sizes:
    """What a stage holds, in bytes, were it on one device."""

    trained: int
    """How many numbers are trained, in float32."""
    frozen: int
    """The transformer's other weights."""
    others: int
    """Text encoders, VAE and rewards' networks: whole on every device."""
    roles: int
    """Copies of weights that the stage keeps."""
    block: int
    """The largest block of the transformer, in float32."""


@dataclass(frozen=True)
class Phase:
    """What is held for a while beside weights, optimizer and roles, in bytes."""

    activations: float
    caches: float = 0.0
    gradients: bool = True
    """Whether gradients are there already: not in the first backward of a step, which makes them while it
    lets go of activations."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device when it holds most."""

    weights: float
    gradients: float
    optimizer: float
    roles: float
    activations: float
    caches: float
    """Items and encoded prompts of the batch, and blocks gathered from other devices."""
    phase: str
    """When that is."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Part -> bytes."""
        names = ("weights", "gradients", "optimizer", "roles", "activations", "caches")
        return {name: getattr(self, name) for name in names}


def memory(
    sizes: Sizes,
    phases: Mapping[str, Phase],
    *,
    strategy: StrategyName = "single",
    zero_stage: int = 2,
    world_size: int = 1,
    optimizer_bytes: float = ADAMW_BYTES,
) -> Memory:
    """The memory of one of ``world_size`` devices in that of the ``phases`` that needs most.

    ``fsdp2`` spreads weights, gradients, optimizer and roles; ``deepspeed`` the optimizer (``zero_stage`` 1),
    the gradients as well (2), weights and roles as well (3) (Rajbhandari et al. 2019, arXiv:1910.02054). What
    spreads weights gathers two blocks at a time. Buffers that a library keeps for messages are not counted.
    """
    stage = {"single": 0, "ddp": 0, "fsdp2": 3, "deepspeed": zero_stage}[strategy]
    shares = [world_size if stage >= least else 1 for least in (1, 2, 3)]
    gradients = 4 * sizes.trained / shares[1]

    def held(name: str) -> float:
        phase = phases[name]
        return phase.activations + phase.caches + gradients * phase.gradients

    most = max(phases, key=held)
    gathered = 2 * sizes.block if shares[2] > 1 else 0
    # before the partitioned step DeepSpeed keeps a flat copy of the weights that it steps
    flat = 4 * sizes.trained / world_size if strategy == "deepspeed" else 0
    return Memory(
        weights=(4 * sizes.trained + sizes.frozen) / shares[2] + sizes.others + flat,
        gradients=gradients * phases[most].gradients,
        optimizer=optimizer_bytes * sizes.trained / shares[0],
        roles=sizes.roles / shares[2],
        activations=phases[most].activations,
        caches=phases[most].caches + gathered,
        phase=most,
    )
