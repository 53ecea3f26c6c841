"""What does one process hold of weights, gradients and optimizer, and in which memory? Asked by the plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A fraction of something, on the device or in the CPU's memory."""

    of: float = 1.0
    on_host: bool = False


@dataclass(frozen=True)
class Shares:
    """What one process holds, by default all of everything on its device."""

    weights: Part = Part()
    """Of the transformer's weights, and of roles, which lie as they do."""
    gradients: Part = Part()
    moments: Part = Part()
    """Of what the optimizer keeps."""
    copies: Part = Part(0.0)
    """Float32 copies of the trained weights and gradients beside them, in all their sizes."""
    gathers: bool = False
    """Whether a forward puts blocks together from parts, and takes them apart again."""
    keeps_gradients: bool = False
    """Whether the room of the gradients stays taken between the steps."""
    buffer: int = 0
    """Bytes on the device for gradients on their way, while there are any."""
