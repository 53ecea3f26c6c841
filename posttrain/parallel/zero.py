"""ZeRO: optimizer state (1), gradients (2) and weights (3) sharded over the processes, by DeepSpeed."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from posttrain.distributed.world import World
from posttrain.errors import TrainingError
from posttrain.optim.optimizers import optimizer_of
from posttrain.parallel.strategy import Strategy
from posttrain.policy.layout import Layout
from posttrain.policy.piece import Piece, Stored

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.policy.policy import Policy


class Partitioned(Layout):
    """ZeRO-3: each weight is flattened, padded, and cut into equal shards."""

    sharded: ClassVar = True

    def __init__(self, engine: Any, world: World) -> None:
        self.engine, self.world = engine, world
        self.offloaded = engine.device.type == "cuda" and engine.zero_offload_param() is not None

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape  # type: ignore[attr-defined]

    def local(self, parameter: nn.Parameter) -> Tensor:
        return parameter.ds_tensor.data  # type: ignore[attr-defined]

    def piece(self, parameter: nn.Parameter, held: Tensor) -> Piece:
        shape = self.shape(parameter)
        start = min(held.numel() * self.world.rank, shape.numel())
        return Piece(held[: shape.numel() - start], shape, start)  # what follows is padding

    def gathered(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        flat = self.world.gather(held.to(self.engine.device))
        return flat[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]

    def shard(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        held = self.local(parameter)
        flat = whole.flatten()[held.numel() * self.world.rank :][: held.numel()]
        return nn.functional.pad(flat.to(held), (0, held.numel() - len(flat)))

    def mark_written(self) -> None:
        self.engine.optimizer.parameter_offload.partition_all_parameters()


class Zero(Strategy):
    """The strategy of :class:`posttrain.parallel.deepspeed.DeepSpeed`."""

    def __init__(
        self, policy: Policy, settings: Train, world: World, configuration: dict[str, Any], *, offloads: bool
    ) -> None:
        """``configuration`` is what DeepSpeed gets. Raises TrainingError if it runs something else."""
        super().__init__(policy, world)
        # DeepSpeed replaces this function at stage 3; see close
        self.linear = nn.functional.linear
        deepspeed = _imported(policy.model.device)
        self.engine, self.inner = deepspeed.initialize(
            model=policy.model.transformer,
            optimizer=optimizer_of(settings, policy.trained.values()),
            config=configuration,
            dist_init_required=False,
        )[:2]
        self.optimizer = self.inner
        self.stage = self.engine.zero_optimization_stage()
        self._check(configuration["zero_optimization"]["stage"], offloads)
        self.layout = Partitioned(self.engine, world) if self.stage == 3 else Layout()
        self.compiles = self.stage != 3
        policy.model.module = self.engine

    def _check(self, stage: int, offloads: bool) -> None:
        """Raise TrainingError unless DeepSpeed runs what the recipe says."""
        processes = torch.distributed.get_world_size(self.engine.data_parallel_group)
        if self.stage != stage or processes != self.world.size:
            raise TrainingError(
                f"DeepSpeed runs ZeRO-{self.stage} on {processes} processes, "
                f"not ZeRO-{stage} on {self.world.size}"
            )
        if offloads and not (self.inner.offload_optimizer if self.stage == 3 else self.inner.cpu_offload):
            raise TrainingError("DeepSpeed keeps the optimizer on the device, although offload is true")

    def begin_micro_batch(self, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages the gradients of the processes, but the losses are parts of a sum
        self.engine.backward(loss * self.world.size)

    def zero_grad(self) -> None:
        return  # the gradients are in DeepSpeed's buffers; see Strategy.zero_grad

    def step(self, max_norm: float) -> float:
        del max_norm  # the engine's configuration has it
        self.engine.step()
        if self.inner.overflow:
            return math.nan
        return float(self.engine.get_global_grad_norm() or 0.0)

    def moments(self, name: str) -> dict[str, Piece]:
        parameter, states = self.policy.trained[name], self.inner.optimizer.state
        state = next((states[flat] for flat in self._flat_parameters() if states.get(flat)), None)
        if state is None:
            return {}
        keys = [key for key, value in state.items() if isinstance(value, Tensor) and value.ndim]
        step = torch.as_tensor(state["step"])
        return {
            **{key: self._moment(parameter, key) for key in keys},
            "step": Piece(step, step.shape, everywhere=True),
        }

    def _moment(self, parameter: nn.Parameter, key: str) -> Piece:
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_optimizer_state

            return self.layout.piece(parameter, safe_get_local_optimizer_state(parameter, key))
        # stages 1 and 2 cut one flat tensor of many weights: this process may have no part of this one
        if (mapping := parameter._hp_mapping) is None:  # type: ignore[attr-defined]
            return Piece(torch.empty(0), parameter.shape)
        return Piece(mapping.get_hp_fragment(key), parameter.shape, mapping.lp_fragment_address.start)

    def load_moments(self, moments: Mapping[str, Mapping[str, Stored]]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        if not moments:
            return
        first = next(iter(moments.values()))
        step, keys = first["step"].whole(), [key for key, stored in first.items() if stored.shape]
        for flat in self._flat_parameters():
            zeros = {key: torch.zeros_like(flat) for key in keys}
            self.inner.optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **zeros}
        if self.stage != 3:
            self.inner._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.policy.trained.items():
            for key in keys:
                if self.stage != 3:
                    moments[name][key].read(self._moment(parameter, key))
                    continue
                held = torch.zeros_like(self.layout.local(parameter))
                moments[name][key].read(self.layout.piece(parameter, held))
                safe_set_local_optimizer_state(parameter, held, key)

    def mark_loaded(self) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        super().mark_loaded()
        for parameter in self.policy.trained.values():
            if self.stage == 3:
                safe_set_local_fp32_param(parameter, self.layout.local(parameter))
            else:
                safe_set_full_fp32_param(parameter, parameter.data)

    def close(self) -> None:
        super().close()
        self.engine.destroy()
        # stage 3 installed its own, which rounds differently, for every model of this process
        nn.functional.linear = self.linear

    def _flat_parameters(self) -> list[Tensor]:
        """The flat tensors that the optimizer steps."""
        if self.stage == 3:
            return self.inner.fp32_partitioned_groups_flat
        return self.inner.single_partition_of_fp32_groups


def _imported(device: torch.device) -> Any:
    """The ``deepspeed`` module, joined to the process group that exists."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed demands it of one process, too
    # DeepSpeed compiles an operator at its first start, with the ninja that pip installed beside this Python
    beside = os.path.dirname(sys.executable)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that every version of torch knows, and newer ones warn about
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed
