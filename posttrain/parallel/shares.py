"""What one process holds of weights, gradients and optimizer state, and in which memory; for planning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """A fraction of something, on the device or in the CPU's memory."""

    fraction: float = 1.0
    on_host: bool = False


@dataclass(frozen=True)
class Shares:
    """What one process holds; by default everything, on its device."""

    weights: Share = Share()
    """Share of the transformer's weights, and of the roles, which are spread alike."""
    gradients: Share = Share()
    moments: Share = Share()
    """Share of the optimizer's state."""
    copies: Share = Share(0.0)
    """Extra float32 copies, as a multiple of the trained weights' size."""
    gathers: bool = False
    """Whether a forward gathers the shards of each block and drops them again."""
    keeps_gradients: bool = False
    """Whether the memory of the gradients stays allocated between steps."""
    buffer: int = 0
    """Bytes on the device for gradients that are being sent, while there are any."""
