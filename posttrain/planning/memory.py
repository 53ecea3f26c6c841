"""Adds up the memory of one device, part by part, in the phase that needs most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.parallel.shares import Share, Shares

if TYPE_CHECKING:
    from posttrain.model import EncoderName
    from posttrain.planning.sizes import Sizes

PARTS = ("weights", "gradients", "optimizer", "roles", "activations", "caches")


@dataclass(frozen=True)
class Phase:
    """What a device holds during one phase of a stage, beside weights, optimizer and roles. In bytes."""

    activations: float
    caches: float = 0.0
    gradients: bool = False
    """Whether gradients exist already. The first backward of a step makes them as it frees activations."""
    encoders: frozenset[EncoderName] = frozenset()
    """The encoders that are wholly on the device."""
    visiting: float = 0.0
    """Bytes of an encoder that rests, and has a part of it on the device to work."""
    forward: bool = False
    """Whether the transformer runs forward."""
    backward: bool = False
    """Whether the transformer runs backward."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device in its largest phase."""

    weights: float
    gradients: float
    optimizer: float
    roles: float
    activations: float
    caches: float
    """The batch's items and encoded prompts, blocks gathered from other devices, and message buffers."""
    phase: str
    """The name of the largest phase."""
    host: float = 0.0
    """Bytes in the CPU's memory, for this device."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """The bytes of each part, by its name in PARTS."""
        return {name: getattr(self, name) for name in PARTS}


def memory(
    sizes: Sizes,
    phases: Mapping[str, Phase],
    shares: Shares,
    resting: Iterable[EncoderName] = (),
    *,
    separate: bool = True,
) -> Memory:
    """The memory of a device that holds ``shares`` of the weights, in the largest of the ``phases``.

    Encoders that rest (``resting``) have a copy in the CPU's memory. If the device has no ``separate``
    memory, as a CPU, it holds everything itself.
    """

    def on(host: bool, share: Share, size: float) -> float:
        return size * share.fraction if (share.on_host and separate) == host else 0.0

    def parts(phase: Phase, host: bool = False) -> dict[str, float]:
        weights = on(host, shares.weights, 4 * sizes.trained + sizes.frozen + sizes.lowered)
        caches = 0.0
        if not host:
            weights += sizes.rewards + sum(sizes.encoders.get(name, 0) for name in phase.encoders)
            weights += phase.visiting
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

    largest = max(phases, key=lambda name: sum(parts(phases[name]).values()))
    host_peak = max(sum(parts(phase, host=True).values()) for phase in phases.values())
    rests = sum(sizes.encoders.get(name, 0) for name in resting) if separate else 0
    return Memory(**parts(phases[largest]), phase=largest, host=host_peak + rests)
