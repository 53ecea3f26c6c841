"""Fully sharded: every process holds a shard of each weight, gradient and moment (torch's fully_shard)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from posttrain.distributed.world import World
from posttrain.errors import TrainingError
from posttrain.optim.optimizers import optimizer_of
from posttrain.parallel.shares import Share, Shares
from posttrain.parallel.strategy import Parallel, Strategy, TorchStrategy
from posttrain.policy.blocks import blocks
from posttrain.policy.layout import Layout
from posttrain.policy.piece import Piece, Stored

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from posttrain.optim.settings import Train
    from posttrain.policy.policy import Policy


class FSDP2(Parallel):
    """Every process holds one shard of the weights, gradients, optimizer state and roles."""

    strategy: Literal["fsdp2"] = "fsdp2"
    """The name by which recipes choose it."""

    offload: bool = False
    """Keep the shards in the CPU's memory, and take the optimizer steps there."""

    @property
    def needs_group(self) -> bool:
        return True

    def label(self, processes: int) -> str:
        return f"{self.strategy}, offloaded" if self.offload else self.strategy

    def shares(self, processes: int) -> Shares:
        shard = Share(1 / processes, self.offload)
        return Shares(shard, shard, shard, gathers=True)

    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        return FullySharded(policy, settings, world, self.offload)


class Sharded(Layout):
    """Each weight is a DTensor, cut along its first axis."""

    sharded: ClassVar = True

    def __init__(self, module: nn.Module, offloaded: bool) -> None:
        self.module, self.offloaded = module, offloaded

    def local(self, parameter: nn.Parameter) -> Tensor:
        return _as_dtensor(parameter).to_local().data

    def piece(self, parameter: nn.Parameter, held: Tensor) -> Piece:
        mesh, shape = _as_dtensor(parameter).device_mesh, parameter.shape
        # the rows are cut as by torch.chunk: all shards but the last ones have equally many
        rows = min(mesh.get_local_rank() * -(-shape[0] // mesh.size()), shape[0])
        return Piece(held, shape, rows * shape[1:].numel())

    def gathered(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        return self.distributed(parameter, held).full_tensor()

    def shard(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        held = torch.empty_like(self.local(parameter), dtype=whole.dtype)
        Stored([Piece(whole, whole.shape)]).read(self.piece(parameter, held))
        return held

    def distributed(self, parameter: nn.Parameter, held: Tensor) -> DTensor:
        """The DTensor whose local part is ``held``, sharded like the parameter. No other process takes
        part."""
        from torch.distributed.tensor import DTensor

        like = _as_dtensor(parameter)
        return DTensor.from_local(
            held, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    def mark_written(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class FullySharded(TorchStrategy):
    """The strategy of :class:`FSDP2`."""

    def __init__(self, policy: Policy, settings: Train, world: World, offload: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        module, device = policy.model.transformer, policy.model.device
        # shards and sums of gradients stay float32; inputs are the model's to cast, as timesteps stay float32
        low = policy.autocast
        precision = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False
        )
        policy.model.forward_dtype, policy.autocast = low, None
        # the warning is about writing to the transformer's result, which nothing does
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        mesh = init_device_mesh(device.type, (world.size,))
        offloading = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
        for block in blocks(module):
            fully_shard(
                block,
                mesh=mesh,
                mp_policy=precision,
                offload_policy=offloading,
                reshard_after_forward=True,
            )
        # the root must gather again in each forward, because roles change the shards in between
        fully_shard(
            module, mesh=mesh, mp_policy=precision, offload_policy=offloading, reshard_after_forward=True
        )
        policy.find_parameters()
        layout = Sharded(module, offloaded=offload and device.type == "cuda")
        super().__init__(policy, world, layout, optimizer_of(settings, policy.trained.values()))
        from torch.distributed.tensor import DTensor

        if plain := [n for n, p in policy.parameters.items() if not isinstance(p, DTensor)]:
            raise TrainingError(f"fsdp2 left {len(plain)} weights unsharded, the first is {plain[0]!r}")

    def backward(self, loss: Tensor) -> None:
        # FSDP averages the gradients of the processes, but the losses are parts of a sum
        (loss * self.world.size).backward()

    def as_moment(self, parameter: nn.Parameter, stored: Stored) -> Tensor:
        if stored.shape != parameter.shape:
            return super().as_moment(parameter, stored)
        assert isinstance(self.layout, Sharded), "set in __init__"
        held = torch.empty_like(self.layout.local(parameter), dtype=stored.dtype)
        stored.read(self.layout.piece(parameter, held))
        return self.layout.distributed(parameter, held)


def _as_dtensor(parameter: nn.Parameter) -> DTensor:
    return parameter  # type: ignore[return-value]
