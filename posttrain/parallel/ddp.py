"""Data parallel: every process holds all weights, and gradients are added up (torch's DDP)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

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
    """The strategy of :class:`DDP`."""

    def __init__(self, policy: Policy, settings: Train, world: World) -> None:
        super().__init__(policy, world, Layout(), optimizer_of(settings, policy.trained.values()))
        device = policy.model.device
        with warnings.catch_warnings():
            # some versions of torch do not know the name that replaces broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            self.wrapped = DistributedDataParallel(
                policy.model.transformer,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        policy.model.module = self.wrapped

    def begin_micro_batch(self, *, last: bool) -> None:
        self.wrapped.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        # DDP averages the gradients of the processes, but the losses are parts of a sum
        (loss * self.world.size).backward()
