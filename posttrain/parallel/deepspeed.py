"""ZeRO: optimizer (1), gradients too (2), weights too (3) in parts, one of each in every process."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from posttrain.distributed.world import World
from posttrain.errors import TrainingError
from posttrain.optim.optimizers import optimizer_of
from posttrain.parallel.shares import Part, Shares
from posttrain.parallel.strategy import Parallel, Strategy
from posttrain.policy.layout import Layout
from posttrain.registry import AnyPath, at

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.policy.policy import Policy

BUCKET = 500_000_000
"""Gradients in one message, where the file says nothing else: DeepSpeed's own number."""
OWN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
)
"""What a DeepSpeed file may say and the recipe's ``train`` block decides."""


class DeepSpeed(Parallel):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054), in the recipe's precision."""

    strategy: Literal["deepspeed"] = "deepspeed"

    zero_stage: Literal[1, 2, 3] | None = None
    """What is spread: 1 the optimizer, 2 gradients as well, 3 weights as well; 2 by default."""
    offload: bool = False
    """Keep the optimizer in the CPU's memory, and with stage 3 the weights."""
    config: AnyPath | None = None
    """A DeepSpeed JSON file, for its ``zero_optimization`` and other settings. What the recipe decides
    (batch sizes, clipping, optimizer, schedule, precision) is taken from the recipe."""

    @property
    def needs_group(self) -> bool:
        return True

    @model_validator(mode="after")
    def _file_is_read(self) -> Self:
        if self.config is None:
            return self
        found = self._file()
        if found.get("fp16", {}).get("enabled") is True:
            raise at(("config",), "it enables fp16; the precisions that stages train in are fp32 and bf16")
        zero = found.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        if stage not in (1, 2, 3):
            raise at(("config",), f"its zero_optimization.stage is {stage!r}; it must be 1, 2 or 3")
        if self.zero_stage not in (None, stage):
            raise at(("zero_stage",), f"{self.zero_stage} is not the stage of the file in config, {stage}")
        if self.offload:
            raise at(("offload",), "say in the file in config what is offloaded")
        return self

    @property
    def stage(self) -> int:
        """The ZeRO stage that is to be active."""
        if self.config is not None:
            return self._file()["zero_optimization"]["stage"]
        return self.zero_stage or 2

    def problem(self, processes: int) -> str | None:
        del processes
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            return "DeepSpeed is not installed: pip install 'posttrain[deepspeed]'"
        return None

    def described(self, processes: int) -> str:
        offloaded = ", offloaded" if self._offloads("optimizer") or self._offloads("param") else ""
        return f"DeepSpeed ZeRO-{self.stage}{offloaded}"

    def shares(self, processes: int) -> Shares:
        """As DeepSpeed 0.19.8 does it with weights that are trained in float32."""
        stage, part = self.stage, 1 / processes
        offloads = self._offloads("optimizer")
        weights = Part(part, self._offloads("param")) if stage == 3 else Part()
        gradients = Part(part, offloads) if stage > 1 else Part()
        # the optimizer steps a flat copy of its part. On the host the step has gradients of its own as well,
        # and ZeRO-1 and 2 a copy to send back, ZeRO-1 those that add up
        copies = Part({1: 4, 2: 3, 3: 2}[stage] * part, True) if offloads else Part(part)
        zero = self.settings(1.0)["zero_optimization"]
        return Shares(
            weights,
            gradients,
            Part(part, offloads),
            copies,
            gathers=stage == 3,
            keeps_gradients=stage == 3,
            buffer=4 * int(zero.get("reduce_bucket_size", BUCKET)),
        )

    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        return Zero(policy, settings, world, self)

    def settings(self, max_norm: float, *, selective: bool = False) -> dict[str, Any]:
        """The configuration that DeepSpeed gets. ``selective``: of gradient checkpointing."""
        found = _without_auto(self._file()) if self.config is not None else {}
        zero = {"stage": self.stage, "overlap_comm": False, **found.get("zero_optimization", {})}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
            if self.stage == 3:
                zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if self.stage == 3:
            # a weight that stays gathered between forwards would not see what a role put in its place
            zero |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
            }
            if selective:
                # its linear layer adds the bias in place, to the very product that was kept: twice
                zero["memory_efficient_linear"] = False
        return {
            **{key: value for key, value in found.items() if key not in OWN},
            "zero_optimization": zero,
            # begin() says when a step follows; DeepSpeed's own count of micro-batches is not used
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_norm,
            "bf16": {"enabled": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    def _offloads(self, what: Literal["optimizer", "param"]) -> bool:
        zero = self.settings(1.0)["zero_optimization"]
        return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

    def _file(self) -> dict[str, Any]:
        assert self.config is not None, "asked where there is one"
        try:
            found = json.loads(self.config.expanduser().read_text())
        except (OSError, ValueError) as error:
            raise at(("config",), f"cannot read {str(self.config)!r}: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("zero_optimization", {}), dict):
            raise at(("config",), f"{str(self.config)!r} is no DeepSpeed configuration")
        return found


class Partitioned(Layout):
    """ZeRO-3: each weight is flat, padded, and cut into equal parts."""

    sharded: ClassVar = True

    def __init__(self, engine: Any, world: World) -> None:
        self.engine, self.world = engine, world
        self.offloaded = engine.device.type == "cuda" and engine.zero_offload_param() is not None

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape  # type: ignore[attr-defined]

    def local(self, parameter: nn.Parameter) -> Tensor:
        return parameter.ds_tensor.data  # type: ignore[attr-defined]

    def gathered(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        flat = self.world.gather(held.to(self.engine.device))
        return flat[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]

    def shard(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        held = self.held(parameter)
        flat = whole.flatten()[held.numel() * self.world.rank :][: held.numel()]
        return nn.functional.pad(flat.to(held), (0, held.numel() - len(flat)))

    def mark_written(self) -> None:
        self.engine.optimizer.parameter_offload.partition_all_parameters()


class Zero(Strategy):
    """The strategy of :class:`DeepSpeed`."""

    def __init__(self, policy: Policy, settings: Train, world: World, spec: DeepSpeed) -> None:
        super().__init__(policy, world)
        if policy.model.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")  # which it demands of one process, too
        # it compiles an operator at its first start, by the ninja that pip installed beside this Python
        beside = os.path.dirname(sys.executable)
        os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("WARNING")
        # it calls collectives by the names that every version of torch knows
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        own = optimizer_of(settings, policy.trained.values())
        selective = settings.gradient_checkpointing == "selective"
        configuration = spec.settings(settings.max_grad_norm, selective=selective)
        self.linear = nn.functional.linear
        made: Any = deepspeed.initialize(
            model=policy.model.transformer, optimizer=own, config=configuration, dist_init_required=False
        )
        self.engine, self.inner = made[:2]
        self.optimizer = self.inner
        self.stage = self.engine.zero_optimization_stage()
        processes = torch.distributed.get_world_size(self.engine.data_parallel_group)
        if self.stage != spec.stage or processes != world.size:
            raise TrainingError(
                f"DeepSpeed runs ZeRO-{self.stage} on {processes} processes, "
                f"not ZeRO-{spec.stage} on {world.size}"
            )
        if spec.offload and not (self.inner.offload_optimizer if self.stage == 3 else self.inner.cpu_offload):
            raise TrainingError("DeepSpeed keeps the optimizer on the device, although offload is true")
        self.layout = Partitioned(self.engine, world) if self.stage == 3 else Layout()
        policy.model.module = self.engine

    def begin_micro_batch(self, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over the processes, and the loss is a part of a sum
        self.engine.backward(loss * self.world.size)

    def zero_grad(self) -> None:
        return  # they are in buffers of DeepSpeed's, where zeros add nothing

    def step(self, max_norm: float) -> float:
        del max_norm  # it is in the engine's configuration
        self.engine.step()
        if self.inner.overflow:
            return math.nan
        return float(self.engine.get_global_grad_norm() or 0.0)

    def moments(self, name: str) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        parameter = self.policy.trained[name]
        first = next((s for flat in self._flat() if (s := self.inner.optimizer.state.get(flat))), None)
        if first is None:
            return {}
        keys = [key for key, value in first.items() if isinstance(value, Tensor) and value.ndim]
        found: dict[str, Any] = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        return {**found, "step": torch.as_tensor(first["step"]).clone()}

    def load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not moments:
            return
        kinds = next(iter(moments.values()))
        keys = [key for key, value in kinds.items() if value.ndim]
        for flat in self._flat():
            zeros = {key: torch.zeros_like(flat) for key in keys}
            self.inner.optimizer.state[flat] = {"step": kinds["step"].to(flat.device, copy=True), **zeros}
        if self.stage != 3:
            self.inner._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.policy.trained.items():
            for key in keys:
                if self.stage == 3:
                    part = self.layout.shard(parameter, moments[name][key])
                    safe_set_local_optimizer_state(parameter, part, key)
                else:
                    value = moments[name][key].to(parameter.device)
                    safe_set_full_optimizer_state(parameter, value, key)

    def loaded(self) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        super().loaded()
        for parameter in self.policy.trained.values():
            if self.stage == 3:
                safe_set_local_fp32_param(parameter, self.layout.local(parameter))
            else:
                safe_set_full_fp32_param(parameter, parameter.data)

    def close(self) -> None:
        super().close()
        self.engine.destroy()
        # stage 3 puts one of its own there, that rounds otherwise, for every model of this process
        nn.functional.linear = self.linear

    def _flat(self) -> list[Tensor]:
        """The flat parameters that the optimizer steps."""
        if self.stage == 3:
            return self.inner.fp32_partitioned_groups_flat
        return self.inner.single_partition_of_fp32_groups


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not left to the trainer with the word ``auto``."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }
