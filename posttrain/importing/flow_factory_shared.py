"""Writes what several of Flow-Factory's algorithms have: rollout, advantages, times, EMA."""

from __future__ import annotations

from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings
from posttrain.importing.flow_factory_flags import OTHERS


def unread(s: Settings, d: Draft, *groups: str) -> None:
    """Say of the flags of ``groups`` that the algorithm does not read them."""
    for group in groups:
        for flag in OTHERS[group]:
            d.idle.setdefault(flag, f"{s['train.trainer_type']} does not read it")


def range_of(s: Settings, flag: str) -> tuple[float | None, float]:
    """The two ends of a range; the lower one is None if one number was given. Raises PosttrainError."""
    value = s[flag]
    low, high = value if isinstance(value, list) and len(value) == 2 else (None, value)
    return None if low is None else s.number(flag, low), s.number(flag, high)


def limit_of(s: Settings, flag: str) -> float:
    """The bound of a range, which must be symmetric. Raises PosttrainError."""
    low, high = range_of(s, flag)
    if low is not None and low != -high:
        raise s.refused(flag, "the range is symmetric here: give one number")
    return abs(high)


def trained_times(s: Settings) -> int:
    """How many times of a rollout are trained. Raises PosttrainError."""
    return s["train.num_train_timesteps"] or max(1, int(s["train.num_inference_steps"] * width_of(s)))


def width_of(s: Settings) -> float:
    """The part of the schedule in which times are trained. Raises PosttrainError."""
    low, high = range_of(s, "train.timestep_range")
    low = low or 0.0
    if not 0 <= low < high <= 1:
        raise s.refused(
            "train.timestep_range", "a number above 0, 1 at most, or two of which the second is greater"
        )
    return high - low


def put_rollout(d: Draft) -> None:
    """Write group size, steps and guidance."""
    d.same(
        {
            "stage.algorithm.group_size": "train.group_size",
            "stage.algorithm.num_steps": "train.num_inference_steps",
            "stage.algorithm.guidance_scale": "train.guidance_scale",
        }
    )


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
        note = f"there every {every} epochs, here every step"
        d.put("stage.train.ema", decay, "train.ema_decay", note=note)
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


def share_of(count: int, steps: int) -> float:
    """The fraction of which ``int(steps * fraction)`` is ``count``."""
    count = min(count, steps)
    exact = round(count / steps, 4)
    return exact if int(steps * exact) == count else round((count + 0.5) / steps, 4)


def put_density(s: Settings, d: Draft) -> None:
    """Write the density of the times."""
    uniform = s["train.weighting_scheme"] == "uniform"
    d.put("stage.algorithm.weighting_scheme", "none" if uniform else "logit_normal", "train.weighting_scheme")
    for name in ("logit_mean", "logit_std"):
        if uniform:
            d.idle[f"train.{name}"] = "no effect with train.weighting_scheme uniform"
        else:
            d.put(f"stage.algorithm.{name}", s[f"train.{name}"], f"train.{name}")
