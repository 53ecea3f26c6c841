"""How good is a sample beside the others of its prompt? Group-relative advantages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as Flow-GRPO and DiffusionNFT do."""

Mixing = Literal["rewards", "advantages"]
"""Whether several rewards are summed before or after they are made relative; see :func:`mixed_advantages`."""


def group_advantages(rewards: Tensor, group: Tensor, *, global_std: bool) -> Tensor:
    """(n,) float64: each reward less its group's mean, over a standard deviation + 1e-4.

    ``group`` (n,) int64 says which samples belong together. The deviation (of the population) is that of
    all rewards where ``global_std``, as in every published recipe, else that of the group. A group without
    spread gets exactly 0. After Flow-GRPO (arXiv:2505.05470, eq. 4).
    """
    rewards = rewards.double()
    index = torch.unique(group, return_inverse=True)[1]
    count = torch.bincount(index).double()
    mean = torch.zeros_like(count).index_add_(0, index, rewards) / count
    centred = rewards - mean[index]
    if global_std:
        std = rewards.std(correction=0)
    else:
        std = (torch.zeros_like(count).index_add_(0, index, centred.square()) / count).sqrt()[index]
    return torch.where(has_spread(rewards, group), centred / (std + EPSILON), 0.0)


def has_spread(rewards: Tensor, group: Tensor) -> Tensor:
    """(n,) bool: whether the sample's group has two rewards that differ."""
    index = torch.unique(group, return_inverse=True)[1]
    low = torch.full((int(index.max()) + 1,), torch.inf, dtype=rewards.dtype, device=rewards.device)
    high = -low
    low.scatter_reduce_(0, index, rewards, "amin")
    high.scatter_reduce_(0, index, rewards, "amax")
    return (high > low)[index]


def mixed_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    *,
    global_std: bool,
    mixing: Mixing,
) -> Tensor:
    """(n,) float64 advantages of several rewards, each (n,), with ``weights`` by name.

    ``rewards``: of the weighted sum (Flow-GRPO, DiffusionNFT). ``advantages``: the weighted sum of each
    reward's own advantages, so that a reward's scale does not matter (MixGRPO, arXiv:2507.21802).
    """
    if mixing == "rewards":
        return group_advantages(weighted(rewards, weights), group, global_std=global_std)
    parts = {name: group_advantages(r, group, global_std=global_std) for name, r in rewards.items()}
    return weighted(parts, weights)


def weighted(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum (n,) float64 of ``values``."""
    return torch.stack([weights[name] * value.double() for name, value in values.items()]).sum(0)


def mean_group_std(rewards: Tensor, group: Tensor) -> Tensor:
    """The mean over groups of the rewards' standard deviation within the group."""
    index = torch.unique(group, return_inverse=True)[1]
    count = torch.bincount(index).double()
    mean = torch.zeros_like(count).index_add_(0, index, rewards.double()) / count
    square = torch.zeros_like(count).index_add_(0, index, (rewards.double() - mean[index]).square())
    return (square / count).sqrt().mean()
