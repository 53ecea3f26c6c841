"""Data parallel: every process holds all weights, and gradients are added up (torch's DDP)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from posttrain.distributed.world import World
from posttrain.optim.optimizers import optimizer_of
from posttrain.parallel.shares import Shares
from posttrain.parallel.strategy import Parallel, Strategy, TorchStrategy
from posttrain.policy.layout import Layout

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.policy.policy import Policy


class DDP(Parallel):
    """Every process holds all weights, gradients and optimizer state."""

    strategy: Literal["ddp"] = "ddp"
    """The name by which recipes choose it."""

    @property
    def needs_group(self) -> bool:
        return True

    def shares(self, processes: int) -> Shares:
        # gradients are views of the buckets that are sent, which stay allocated
        return Shares(keeps_gradients=True)

    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        return Replicated(policy, settings, world)


class Replicated(TorchStrategy):
    """The strategy of :class:`DDP`.

    In float32, torch's wrapper sends gradients during the last backward of a step. In bf16 the float32
    gradients beside the masters are added up after it.
    """

    tries_alone: ClassVar = True

    def __init__(self, policy: Policy, settings: Train, world: World) -> None:
        policy.lower()
        super().__init__(policy, world, Layout(), optimizer_of(settings, policy.trained.values()))
        self.wrapped = None if policy.masters is not None else _wrapped(policy)
        if self.wrapped is not None:
            policy.model.module = self.wrapped

    def begin_micro_batch(self, *, last: bool) -> None:
        if self.wrapped is not None:
            self.wrapped.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        # the wrapper averages the gradients of the processes, but the losses are parts of a sum
        super().backward(loss if self.wrapped is None else loss * self.world.size)

    def step(self, max_norm: float) -> float:
        if (masters := self.policy.masters) is not None:
            for gradients in masters.gradients():
                total = self.world.sum(torch.cat([gradient.flatten() for gradient in gradients]))
                parts = total.split([gradient.numel() for gradient in gradients])
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))
        return super().step(max_norm)


def _wrapped(policy: Policy) -> DistributedDataParallel:
    device = policy.model.device
    with warnings.catch_warnings():
        # some versions of torch do not know the name that replaces broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            policy.model.transformer,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
