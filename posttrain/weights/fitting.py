"""Accounts for weights: every name, shape and kind of number, and that every number is finite."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 3
"""A message names this many weights of each fault and counts the others."""
HARMLESS = {
    r"(^|\.)position_ids$": "the numbers 0, 1, 2 and so on, which older files keep",
    r"(^|\.)relative_position_index$": "indices that Swin computes from its window",
    r"(^|\.)attn_mask$": "the mask of causal attention, which older files keep",
    r"^criterion\.": "the weights of a training loss",
}
"""Patterns of names that may be left over in a file, each with what they are. None changes an output."""


def misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """Say how ``state`` differs from ``own``, a network's weights; None if it fits.

    Every name, shape and kind of number must fit, and every number must be finite. A layer that keeps its
    random initial values would still give images and scores.
    """
    shared = [name for name in own if name in state]
    return described(
        missing=[name for name in own if name not in state],
        left_over=[name for name in state if name not in own],
        shapes=[(n, state[n].shape, own[n].shape) for n in shared if state[n].shape != own[n].shape],
        kinds=[(n, k, o) for n in shared if (k := kind_of(state[n])) != (o := kind_of(own[n]))],
        infinite=not_finite(state),
    )


def described(
    missing: Iterable[str] = (),
    left_over: Iterable[str] = (),
    shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]] = (),
    kinds: Iterable[tuple[str, str, str]] = (),
    infinite: Iterable[str] = (),
    overflowing: Iterable[str] = (),
) -> str | None:
    """The faults of weights in one line: the count of each fault and its first names; None without any.

    ``shapes`` and ``kinds`` have a name, what was found and what is wanted. Harmless names that are left over
    are no fault.
    """
    faults = {
        "missing": list(missing),
        "left over": [name for name in left_over if not harmless(name)],
        "of another shape": [f"{n}: {tuple(found)}, not {tuple(own)}" for n, found, own in shapes],
        "of another kind": [f"{n}: {found}, not {own}" for n, found, own in kinds],
        "not finite": list(infinite),
        "too large for the precision": list(overflowing),
    }
    return "; ".join(_counted(fault, names) for fault, names in faults.items() if names) or None


def harmless(name: str) -> bool:
    """Whether a weight of this ``name`` may be left over; see :data:`HARMLESS`."""
    return any(re.search(pattern, name) for pattern in HARMLESS)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or an infinity.

    The smallest and the largest number tell it: one pass without another tensor, 0.03 to 0.06 s/GB on one
    core, of which ``isfinite`` takes 2 to 6. So text encoders of 10 GB cost half a second.
    """
    return [name for name, tensor in tensors.items() if not is_finite(tensor)]


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of ``tensor`` is NaN or infinite. Integers and truth values are finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    numbers = (
        tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
    )  # torch orders no float8
    low, high = numbers.aminmax()
    return bool(low.isfinite() & high.isfinite())


def kind_of(weight: Tensor | str) -> str:
    """The kind of number of a tensor, or of safetensors' name for a dtype, such as ``BF16``."""
    if isinstance(weight, str):
        kinds = {"F": "floats", "BF": "floats", "I": "integers", "U": "integers", "BOOL": "truth values"}
        return kinds.get(re.sub(r"\d.*", "", weight), "complex numbers")
    if weight.is_complex():
        return "complex numbers"
    if weight.is_floating_point():
        return "floats"
    return "truth values" if str(weight.dtype) == "torch.bool" else "integers"


def _counted(fault: str, names: Sequence[str]) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} {fault} ({', '.join(names[:SHOWN])}{more})"
