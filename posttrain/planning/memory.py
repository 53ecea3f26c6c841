"""How much memory does training need on each device, by part, for a way of spreading it over several?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from posttrain.parallel.shares import Share, Shares

if TYPE_CHECKING:
    from torch import nn

    from posttrain.model import EncoderName
    from posttrain.optim.settings import OptimizerName

SMALL, BLOCK = 4096, 256
"""Moments in 8 bits: of tensors of at least so many numbers, with a float32 scale for each so many."""
PARTS = ("weights", "gradients", "optimizer", "roles", "activations", "caches")


@dataclass(frozen=True)
class Sizes:
    """What a stage holds, in bytes, were it on one device."""

    trained: int
    """How many numbers are trained, in float32."""
    frozen: int
    """The transformer's other weights."""
    moments: float
    """What the optimizer keeps."""
    roles: int
    """Copies of weights that the stage keeps."""
    rewards: int = 0
    """The networks of rewards: whole on every device."""
    encoders: Mapping[EncoderName, int] = field(default_factory=dict)
    """The text encoders; and the autoencoder."""
    gathered: int = 0
    """The transformer's weights outside its blocks, and of two blocks: what a forward holds at a time."""
    gathered_gradients: int = 0
    """The gradients of those."""


@dataclass(frozen=True)
class Phase:
    """What is held for a while beside weights, optimizer and roles, in bytes."""

    activations: float
    caches: float = 0.0
    gradients: bool = False
    """Whether gradients are there already: not in the first backward of a step, which makes them while it
    lets go of activations."""
    encoders: frozenset[EncoderName] = frozenset()
    """Those on the device."""
    forward: bool = False
    """Whether the transformer works."""
    backward: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one device when it holds most."""

    weights: float
    gradients: float
    optimizer: float
    roles: float
    activations: float
    caches: float
    """Items and encoded prompts of the batch, blocks gathered from other devices, buffers for messages."""
    phase: str
    """When that is."""
    host: float = 0.0
    """In the CPU's memory, for this device."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Part -> bytes."""
        return {name: getattr(self, name) for name in PARTS}


def memory(
    sizes: Sizes,
    phases: Mapping[str, Phase],
    shares: Shares,
    resting: Iterable[EncoderName] = (),
    *,
    separate: bool = True,
) -> Memory:
    """The memory of a device that has those ``shares``, in that of the ``phases`` that needs most.

    Encoders that are ``resting`` at some time have a copy in the CPU's memory. Where that is not
    ``separate`` from the device's, all of it is the device's.
    """

    def on(host: bool, share: Share, size: float) -> float:
        return size * share.fraction if (share.on_host and separate) == host else 0.0

    def parts(phase: Phase, host: bool = False) -> dict[str, float]:
        weights = on(host, shares.weights, 4 * sizes.trained + sizes.frozen)
        caches = 0.0
        if not host:
            weights += sizes.rewards + sum(sizes.encoders.get(name, 0) for name in phase.encoders)
            caches = phase.caches + shares.buffer * (phase.backward or shares.gathers)
            caches += sizes.gathered * (shares.gathers and phase.forward)
            caches += sizes.gathered_gradients * (shares.gathers and phase.backward)
        return {
            "weights": weights + on(host, shares.copies, 4 * sizes.trained),
            "gradients": on(host, shares.gradients, 4 * sizes.trained)
            * (phase.gradients or shares.keeps_gradients),
            "optimizer": on(host, shares.moments, sizes.moments),
            "roles": on(host, shares.weights, sizes.roles),
            "activations": 0.0 if host else phase.activations,
            "caches": caches,
        }

    most = max(phases, key=lambda name: sum(parts(phases[name]).values()))
    hosts = max(sum(parts(phase, host=True).values()) for phase in phases.values())
    rests = sum(sizes.encoders.get(name, 0) for name in resting) if separate else 0
    return Memory(**parts(phases[most]), phase=most, host=hosts + rests)


def moment_bytes(optimizer: OptimizerName, parameters: Iterable[nn.Parameter]) -> float:
    """What the optimizer keeps of ``parameters``: two moments of each number."""
    sizes = [parameter.numel() for parameter in parameters]
    if optimizer == "adamw":
        return 8.0 * sum(sizes)
    return float(sum(8 * n if n < SMALL else 2 * (n + 4 * -(-n // BLOCK)) for n in sizes))
