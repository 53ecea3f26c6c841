"""Group-relative advantages: how much better a sample scores than the other samples of its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as in the published code of Flow-GRPO and DiffusionNFT."""

Mixing = Literal["rewards", "advantages"]
"""What is summed where there are several rewards; see :func:`mixed_advantages`."""


def group_advantages(rewards: Tensor, group: Tensor, *, global_std: bool) -> Tensor:
    """Advantages (n,) float64: (reward - mean of its group) / (standard deviation + 1e-4).

    ``rewards`` (n,); samples with equal ``group`` (n,) int64 form a group. The standard deviation is that of
    the population: of all rewards if ``global_std``, as in every published recipe, else of the group. A group
    whose rewards are all equal gets exactly 0. After Flow-GRPO (arXiv:2505.05470, eq. 4).
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
    """(n,) bool: whether any two ``rewards`` (n,) of the sample's ``group`` (n,) differ."""
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
    """Advantages (n,) float64 of several rewards, each (n,), with a weight for each by name.

    ``mixing`` is ``rewards`` for the advantages of the weighted sum (Flow-GRPO, DiffusionNFT), ``advantages``
    for the weighted sum of each reward's own advantages, which do not depend on the reward's scale (MixGRPO,
    arXiv:2507.21802).
    """
    if mixing == "rewards":
        return group_advantages(weighted(rewards, weights), group, global_std=global_std)
    parts = {name: group_advantages(r, group, global_std=global_std) for name, r in rewards.items()}
    return weighted(parts, weights)


def weighted(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum (n,) float64 of ``values`` (n,), each times its weight."""
    return torch.stack([weights[name] * value.double() for name, value in values.items()]).sum(0)


def mean_group_std(rewards: Tensor, group: Tensor) -> Tensor:
    """The standard deviation of ``rewards`` (n,) within a group, averaged over groups: a scalar, float64."""
    index = torch.unique(group, return_inverse=True)[1]
    count = torch.bincount(index).double()
    mean = torch.zeros_like(count).index_add_(0, index, rewards.double()) / count
    square = torch.zeros_like(count).index_add_(0, index, (rewards.double() - mean[index]).square())
    return (square / count).sqrt().mean()
