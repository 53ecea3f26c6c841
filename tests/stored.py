"""Reads checkpoints as nested dicts of whole tensors, makes stored tensors, and counts what is made."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.engine.checkpoint import load
from posttrain.policy.piece import Piece, Stored


def stored(tensor):
    """A tensor as a checkpoint has it, in one piece."""
    return Stored([Piece(tensor, tensor.shape)])


def whole_state(checkpoint):
    """The parts of the state in the folder ``checkpoint`` by name, with copies of its whole tensors."""

    def tensors(found):
        return {n: tensors(v) for n, v in found.items()} if isinstance(found, dict) else found.whole().clone()

    state = vars(load(checkpoint))
    return {**state, **{part: tensors(state[part]) for part in ("trained", "roles", "optimizer")}}


class Made(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block, views left out."""

    def __init__(self):
        super().__init__()
        self.bytes, self.largest = 0, 0
        self.most = 0
        """Of those, the most that were there at once."""
        self._now = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        for tensor in tensors(found):
            if tensor.untyped_storage().data_ptr() not in given:
                self.bytes += tensor.nbytes
                self.largest = max(self.largest, tensor.nbytes)
                self._count(tensor.nbytes)
                weakref.finalize(tensor.untyped_storage(), self._count, -tensor.nbytes)
        return found

    def _count(self, size):
        self._now += size
        self.most = max(self.most, self._now)


def tensors(tree):
    # what a collective returned may be in a wrapper that waits for it
    leaves = (getattr(leaf, "elem", leaf) for leaf in tree_leaves(tree))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
