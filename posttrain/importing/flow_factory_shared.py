"""What Flow-Factory's algorithms share, as fields of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings
from posttrain.importing.flow_factory_flags import OTHERS


def top_of(s: Settings) -> Mapping[str, Any]:
    """The first optimizer's block, or an empty one."""
    value = s["optimizers"]
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, Mapping) else {}


def unread(s: Settings, d: Draft, *groups: str) -> None:
    """Say of the flags of ``groups`` that the algorithm does not read them."""
    for group in groups:
        for flag in OTHERS[group]:
            d.idle.setdefault(flag, f"{s['train.trainer_type']} does not read it")


def limit_of(s: Settings, flag: str) -> float:
    """The bound of a range, which must be symmetric. Raises PosttrainError."""
    value: Any = s[flag]
    low: Any = None
    high: Any = value
    if isinstance(value, list) and len(value) == 2:
        low, high = value
    low, high = (None if low is None else s.number(flag, low)), s.number(flag, high)
    if low is not None and low != -high:
        raise s.refused(flag, "the range is symmetric here: give one number")
    return abs(high)


def put_rollout(s: Settings, d: Draft) -> None:
    """Write group size, steps and guidance."""
    d.put("stage.algorithm.group_size", s["train.group_size"], "train.group_size")
    d.put("stage.algorithm.num_steps", s["train.num_inference_steps"], "train.num_inference_steps")
    d.put("stage.algorithm.guidance_scale", s["train.guidance_scale"], "train.guidance_scale")


def put_advantages(s: Settings, d: Draft) -> None:
    """Write how rewards become advantages."""
    gdpo = s["train.advantage_aggregation"] == "gdpo"
    if not gdpo:
        d.put("stage.algorithm.global_std", s["train.global_std"], "train.global_std")
    d.put("stage.algorithm.adv_clip_max", limit_of(s, "train.adv_clip_range"), "train.adv_clip_range")
    if not gdpo:
        d.put("stage.algorithm.reward_mixing", "rewards", "train.advantage_aggregation")
        return
    d.idle["train.global_std"] = "gdpo divides by the standard deviation of the group"
    d.put("stage.algorithm.global_std", False, note="as gdpo has it")
    words = "the summed advantages are not normalised over the batch, as gdpo does: it has no counterpart"
    d.near("stage.algorithm.reward_mixing", "advantages", "train.advantage_aggregation", words)


def put_ema(s: Settings, d: Draft) -> None:
    """Write the EMA."""
    decay = s["train.ema_decay"]
    if decay:
        every = s["train.ema_update_interval"]
        d.put(
            "stage.train.ema", decay, "train.ema_decay", note=f"there every {every} epochs, here every step"
        )
        d.differs.append(
            f"the EMA moves with each optimizer step; there every {every} epochs (train.ema_update_interval)"
        )
    else:
        d.idle["train.ema_decay"] = "0: off, as here"
    d.idle["train.ema_update_interval"] = "the EMA moves with each optimizer step"
    d.idle["train.ema_decay_schedule"] = "the EMA's decay is constant"


def put_solver(s: Settings, d: Draft) -> None:
    """Write the solver of a deterministic rollout."""
    kind = s["scheduler.dynamics_type"]
    if kind != "ODE":
        d.lost["scheduler.dynamics_type"] = "the rollout is deterministic: no step of it is trained"
    d.put("stage.algorithm.solver", "euler", "scheduler.dynamics_type", note="dpm2 is better at equal steps")


def width_of(s: Settings) -> float:
    """The part of the schedule in which times are trained. Raises PosttrainError."""
    value: Any = s["train.timestep_range"]
    low: Any = 0.0
    high: Any = value
    if isinstance(value, list) and len(value) == 2:
        low, high = value
    low, high = s.number("train.timestep_range", low), s.number("train.timestep_range", high)
    if not 0 <= low < high <= 1:
        raise s.refused("train.timestep_range", "a number up to 1, or two")
    return high - low


def share_of(count: int, steps: int) -> float:
    """The fraction of which ``int(steps * fraction)`` is ``count``."""
    exact = round(min(count, steps) / steps, 4)
    return exact if int(steps * exact) == min(count, steps) else round((min(count, steps) + 0.5) / steps, 4)


def put_density(s: Settings, d: Draft) -> None:
    """Write the density of the times."""
    uniform = s["train.weighting_scheme"] == "uniform"
    d.put("stage.algorithm.weighting_scheme", "none" if uniform else "logit_normal", "train.weighting_scheme")
    for name in ("logit_mean", "logit_std"):
        if uniform:
            d.idle[f"train.{name}"] = "no effect with train.weighting_scheme uniform"
        else:
            d.put(f"stage.algorithm.{name}", s[f"train.{name}"], f"train.{name}")
