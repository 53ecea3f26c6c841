"""The recipe's block for DeepSpeed's ZeRO, and the configuration that DeepSpeed gets."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator

from posttrain.distributed.world import World
from posttrain.parallel.shares import Share, Shares
from posttrain.parallel.strategy import Parallel, Strategy
from posttrain.parallel.zero import Zero
from posttrain.registry import NO_PATH, MaybePath, field_error
from posttrain.support.paths import expanded

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.policy.policy import Policy

BUCKET = 500_000_000
"""DeepSpeed's default for the gradients in one message."""
DECIDED_BY_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
)
"""Settings of a DeepSpeed file that are ignored, because the recipe's ``train`` block decides them."""


class DeepSpeed(Parallel):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054), in the recipe's precision."""

    lowers: ClassVar = False

    strategy: Literal["deepspeed"] = "deepspeed"
    """The name by which recipes choose it."""

    zero_stage: Literal[1, 2, 3] | None = None
    """What is sharded: 1 the optimizer state, 2 also the gradients, 3 also the weights. 2 by default."""
    offload: bool = False
    """Keep the optimizer state in the CPU's memory, and with stage 3 the weights."""
    config: MaybePath = NO_PATH
    """A DeepSpeed JSON file, for its ``zero_optimization`` and other settings. What the recipe decides
    (batch sizes, clipping, optimizer, schedule, precision) is taken from the recipe."""

    @property
    def needs_group(self) -> bool:
        return True

    @model_validator(mode="after")
    def _config_agrees(self) -> Self:
        if self.config is None:
            return self
        file = _read(self.config)
        if file.get("fp16", {}).get("enabled") is True:
            raise field_error(("config",), "the file enables fp16; stages train in fp32 or bf16")
        stage = file.get("zero_optimization", {}).get("stage", 0)
        if stage not in (1, 2, 3):
            message = f"the file's zero_optimization.stage is {stage!r}; it must be 1, 2 or 3"
            raise field_error(("config",), message)
        if self.zero_stage not in (None, stage):
            message = f"{self.zero_stage} is not the stage in the config file, {stage}"
            raise field_error(("zero_stage",), message)
        if self.offload:
            raise field_error(("offload",), "with a config file, offloading is set in that file")
        return self

    @property
    def stage(self) -> int:
        """The ZeRO stage that must be active."""
        if self.config is not None:
            return _read(self.config)["zero_optimization"]["stage"]
        return self.zero_stage or 2

    def problem(self, processes: int) -> str | None:
        del processes
        if find_spec("deepspeed") is None:
            return "DeepSpeed is not installed: pip install 'posttrain[deepspeed]'"
        return None

    def label(self, processes: int) -> str:
        offloaded = ", offloaded" if self._offloads("optimizer") or self._offloads("param") else ""
        return f"DeepSpeed ZeRO-{self.stage}{offloaded}"

    def shares(self, processes: int) -> Shares:
        """As in DeepSpeed 0.19.8, with trained weights in float32."""
        stage, fraction = self.stage, 1 / processes
        offloads = self._offloads("optimizer")
        # The optimizer steps a flat copy of its shard. On the host there is also a copy of the gradients; in
        # ZeRO-1 and 2 one of the weights, to send back; and in ZeRO-1 one in which gradients add up.
        copies = Share({1: 4, 2: 3, 3: 2}[stage] * fraction, True) if offloads else Share(fraction)
        return Shares(
            weights=Share(fraction, self._offloads("param")) if stage == 3 else Share(),
            gradients=Share(fraction, offloads) if stage > 1 else Share(),
            moments=Share(fraction, offloads),
            copies=copies,
            gathers=stage == 3,
            keeps_gradients=stage == 3,
            buffer=4 * int(self._zero_optimization().get("reduce_bucket_size", BUCKET)),
        )

    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        selective = settings.gradient_checkpointing not in ("off", "full")
        configuration = self.settings(settings.max_grad_norm, selective=selective)
        return Zero(policy, settings, world, configuration, offloads=self.offload)

    def settings(self, max_norm: float, *, selective: bool = False) -> dict[str, Any]:
        """The configuration that DeepSpeed gets, for clipping to ``max_norm``.

        ``selective`` means that gradient checkpointing is.
        """
        file = _without_auto(_read(self.config)) if self.config is not None else {}
        return {
            **{key: value for key, value in file.items() if key not in DECIDED_BY_RECIPE},
            "zero_optimization": self._zero_optimization(selective=selective),
            # the strategy says when a step follows, so DeepSpeed need not count micro-batches
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_norm,
            "bf16": {"enabled": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    def _zero_optimization(self, *, selective: bool = False) -> dict[str, Any]:
        file = _without_auto(_read(self.config)) if self.config is not None else {}
        zero = {"stage": self.stage, "overlap_comm": False, **file.get("zero_optimization", {})}
        if self.offload:
            pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
            zero["offload_optimizer"] = pinned
            if self.stage == 3:
                zero["offload_param"] = pinned
        if self.stage == 3:
            # weights that stay gathered between forwards would not be those of the role in use
            zero |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
            }
            if selective:
                # that linear layer adds its bias in place to a kept result, so recomputing would add it twice
                zero["memory_efficient_linear"] = False
        return zero

    def _offloads(self, what: Literal["optimizer", "param"]) -> bool:
        offload = self._zero_optimization().get(f"offload_{what}") or {}
        return offload.get("device", "none") != "none"


def _read(path: Path) -> dict[str, Any]:
    try:
        file = json.loads(expanded(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise field_error(("config",), f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(file, dict) or not isinstance(file.get("zero_optimization", {}), dict):
        raise field_error(("config",), f"{str(path)!r} is no DeepSpeed configuration")
    return file


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """The settings whose value is not ``auto``, which leaves them to the trainer."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }
