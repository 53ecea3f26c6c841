"""Fully sharded: every process has a part of each weight, gradient and moment (torch's fully_shard)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from posttrain.distributed.world import World
from posttrain.errors import TrainingError
from posttrain.optim.optimizers import optimizer_of
from posttrain.parallel.shares import Part, Shares
from posttrain.parallel.strategy import Direct, Parallel, Strategy
from posttrain.policy.blocks import blocks
from posttrain.policy.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from posttrain.optim.settings import Train
    from posttrain.policy.policy import Policy


class FSDP2(Parallel):
    """Weights, gradients, optimizer and roles in parts, one of each in every process."""

    strategy: Literal["fsdp2"] = "fsdp2"

    offload: bool = False
    """Keep the parts in the CPU's memory, and take the optimizer's steps there."""

    @property
    def needs_group(self) -> bool:
        return True

    def described(self, processes: int) -> str:
        return f"{self.strategy}, offloaded" if self.offload else self.strategy

    def shares(self, processes: int) -> Shares:
        part = Part(1 / processes, self.offload)
        return Shares(part, part, part, gathers=True)

    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        return FullySharded(policy, settings, world, self.offload)


class Sharded(Layout):
    """Each weight is a DTensor, cut along its first axis."""

    sharded: ClassVar = True

    def __init__(self, module: nn.Module, offloaded: bool) -> None:
        self.module, self.offloaded = module, offloaded

    def local(self, parameter: nn.Parameter) -> Tensor:
        return _distributed(parameter).to_local().data

    def gathered(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        like = _distributed(parameter)
        return DTensor.from_local(
            held, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        ).full_tensor()

    def shard(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        return self.place(parameter, whole).to_local().clone()

    def place(self, parameter: nn.Parameter, whole: Tensor) -> DTensor:
        """``whole``, spread as the parameter is."""
        from torch.distributed.tensor import distribute_tensor

        like = _distributed(parameter)
        # every process reads the same file, so nobody has to send
        return distribute_tensor(
            whole.to(like.to_local().device), like.device_mesh, like.placements, src_data_rank=None
        )

    def mark_written(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class FullySharded(Direct):
    """The strategy of :class:`FSDP2`."""

    def __init__(self, policy: Policy, settings: Train, world: World, offload: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        module, device = policy.model.transformer, policy.model.device
        # nothing here writes into what the transformer returns
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        mesh = init_device_mesh(device.type, (world.size,))
        policy_of = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
        for block in blocks(module):
            fully_shard(block, mesh=mesh, offload_policy=policy_of, reshard_after_forward=True)
        # the root as well gathers anew for each forward: roles change what is held in between
        fully_shard(module, mesh=mesh, offload_policy=policy_of, reshard_after_forward=True)
        policy.find_parameters()
        layout = Sharded(module, offloaded=offload and device.type == "cuda")
        super().__init__(policy, world, layout, optimizer_of(settings, policy.trained.values()))
        from torch.distributed.tensor import DTensor

        if plain := [n for n, p in policy.parameters.items() if not isinstance(p, DTensor)]:
            raise TrainingError(f"fsdp2 left {len(plain)} weights unsharded, {plain[0]!r} first")

    def backward(self, loss: Tensor) -> None:
        # FSDP takes the mean over the processes, and the loss is a part of a sum
        (loss * self.world.size).backward()

    def placed(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        assert isinstance(self.layout, Sharded), "made above"
        return self.layout.place(parameter, whole)


def _distributed(parameter: nn.Parameter) -> DTensor:
    return parameter  # type: ignore[return-value]
