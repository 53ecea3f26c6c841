"""What a reward server grants its clients, and the exception for a request beyond it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STALLED_SECONDS = 1.0
STALLED_BYTES = 65_536
"""A request has stalled if it brings less than so many bytes in so long, far below what networks do. It makes
room for others if connections or memory run short."""


@dataclass(frozen=True)
class Limits:
    """The bounds on size, number and time; ``posttrain serve-reward`` has an option for each."""

    max_bytes: int = 256_000_000
    """Size of the largest request."""
    max_connections: int = 512
    """Connections that may be open at the same time."""
    transfer_seconds: float = 60.0
    """A request must arrive within this time, and its answer must be taken within this time."""


class Refused(Exception):
    """A request that is not scored: the HTTP status, the reason, and what else its answer says."""

    def __init__(self, status: int, reason: str, **entries: Any) -> None:
        super().__init__(reason)
        self.status, self.entries = status, entries
