"""Gives the main process one whole weight after another, of which every process may hold a part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from posttrain.distributed.world import World
from posttrain.policy.policy import Policy
from posttrain.weights.writing import Entry


@contextlib.contextmanager
def whole_weights(policy: Policy, name: str | None, world: World) -> Iterator[dict[str, Entry]]:
    """Yield the weights of a role, or with None the trained ones; each is whole when it is read.

    Every process must enter the block at the same time, and only the main one gets weights. It may read them
    in any order, any number of times. Where weights lie in parts, the others enter their block when the main
    process leaves its own: before, they join in gathering each weight that it reads. So no process holds more
    than one whole weight beside its parts, unless the reader keeps them.
    """
    if not policy.layout.sharded:
        yield _entries(policy, name, partial(policy.whole_weight, name)) if world.is_main else {}
    elif world.is_main:

        def gathered(key: str) -> Tensor:
            world.broadcast(key)
            return policy.whole_weight(name, key)

        try:
            yield _entries(policy, name, gathered)
        finally:
            world.broadcast("")  # no weight has this name
    else:
        while key := world.broadcast(""):
            policy.whole_weight(name, key)
        yield {}


def _entries(policy: Policy, name: str | None, read: Callable[[str], Tensor]) -> dict[str, Entry]:
    return {
        key: Entry(tuple(piece.shape), piece.values.dtype, partial(read, key))
        for key, piece in policy.pieces(name).items()
    }
