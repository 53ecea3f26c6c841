"""Flow-Factory's algorithms as posttrain's: what each ``trainer_type`` sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings
from posttrain.importing.flow_factory_flags import OTHERS

SDE = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance", "CPS": "cps"}


@dataclass(frozen=True)
class Kind:
    """One of posttrain's algorithms, and what writes its fields."""

    ours: str
    put: Callable[[Settings, Draft], None]


def top_of(s: Settings) -> Mapping[str, Any]:
    """The first optimizer's block, or an empty one."""
    value = s["optimizers"]
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, Mapping) else {}


def _unread(s: Settings, d: Draft, *groups: str) -> None:
    for group in groups:
        for flag in OTHERS[group]:
            d.idle.setdefault(flag, f"{s['train.trainer_type']} does not read it")


def _limit(s: Settings, flag: str) -> float:
    value: Any = s[flag]
    low: Any = None
    high: Any = value
    if isinstance(value, list) and len(value) == 2:
        low, high = value
    try:
        low, high = (None if low is None else float(low)), float(high)
    except (TypeError, ValueError):
        raise s.refused(flag, "a number, or two") from None
    if low is not None and low != -high:
        raise s.refused(flag, "the range is symmetric here: give one number")
    return abs(high)


def _shared(s: Settings, d: Draft) -> None:
    d.put("stage.algorithm.group_size", s["train.group_size"], "train.group_size")
    d.put("stage.algorithm.num_steps", s["train.num_inference_steps"], "train.num_inference_steps")
    d.put("stage.algorithm.guidance_scale", s["train.guidance_scale"], "train.guidance_scale")


def _advantages(s: Settings, d: Draft) -> None:
    d.put("stage.algorithm.global_std", s["train.global_std"], "train.global_std")
    d.put("stage.algorithm.adv_clip_max", _limit(s, "train.adv_clip_range"), "train.adv_clip_range")
    mixing = {"sum": "rewards", "gdpo": "advantages"}[s["train.advantage_aggregation"]]
    d.put("stage.algorithm.reward_mixing", mixing, "train.advantage_aggregation")


def _ema(s: Settings, d: Draft) -> None:
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


def _grpo(s: Settings, d: Draft) -> None:
    if s["scheduler.dynamics_type"] == "ODE":
        raise s.refused(
            "scheduler.dynamics_type",
            "an ODE's steps have no probability to train: Flow-SDE, CPS or Dance-SDE",
        )
    _shared(s, d)
    d.put("stage.algorithm.sde_type", SDE[s["scheduler.dynamics_type"]], "scheduler.dynamics_type")
    d.put("stage.algorithm.noise_level", s["scheduler.noise_level"], "scheduler.noise_level")
    steps, last = s["scheduler.sde_steps"], s["train.num_inference_steps"] - 1
    size = s["scheduler.num_sde_steps"]
    first, end = (min(steps), min(max(steps) + 1, last)) if steps else (0, last)
    d.put("stage.algorithm.sde_window_size", min(size, end - first), "scheduler.num_sde_steps")
    d.put("stage.algorithm.sde_window_range", [first, end], "scheduler.sde_steps")
    d.differs.append(
        "the stochastic steps are consecutive, drawn for each batch; there they are drawn "
        "singly from sde_steps"
    )
    d.put("stage.algorithm.clip_range", _limit(s, "train.clip_range"), "train.clip_range")
    d.put("stage.algorithm.beta", s["train.kl_beta"], "train.kl_beta")
    if not s["train.kl_beta"]:
        d.idle["train.kl_type"] = "kl_beta is 0"
    elif (s["train.kl_type"] or "x-based") == "v-based":
        d.put("stage.algorithm.kl_type", "velocity_mse", "train.kl_type")
    else:
        words = "with_dt divides the means' squared distance by 2 std^2; there nothing does: set beta anew"
        d.near("stage.algorithm.kl_type", "with_dt", "train.kl_type", words)
    if s["train.trainer_type"] == "grpo-guard":
        d.put("stage.algorithm.grpo_guard", True, "train.trainer_type")
        d.differs.append("GRPO-Guard also divides the loss of a step by its length, as published; there not")
    _advantages(s, d)
    _ema(s, d)
    _unread(s, d, "times", "pairs", "awm", "nft", "old")


def _solver(s: Settings, d: Draft) -> None:
    kind = s["scheduler.dynamics_type"]
    if kind != "ODE":
        d.lost["scheduler.dynamics_type"] = "the rollout is deterministic: no step of it is trained"
    d.put("stage.algorithm.solver", "euler", "scheduler.dynamics_type", note="dpm2 is better at equal steps")


def _nft(s: Settings, d: Draft) -> None:
    _shared(s, d)
    _solver(s, d)
    d.put("stage.algorithm.beta", s["train.nft_beta"], "train.nft_beta")
    d.put("stage.algorithm.kl_weight", s["train.kl_beta"], "train.kl_beta")
    d.idle["train.kl_type"] = "the squared distance of velocities, as v-based"
    steps = s["train.num_inference_steps"]
    count = s["train.num_train_timesteps"] or max(1, int(steps * _width(s)))
    d.put(
        "stage.algorithm.timestep_fraction",
        _share(count, steps),
        "train.num_train_timesteps",
        note=f"{count} of {steps}",
    )
    d.lost["train.timestep_range"] = "the trained times are drawn from all steps of the rollout"
    if s["train.time_sampling_strategy"] != "discrete":
        d.lost["train.time_sampling_strategy"] = "times are those of the rollout's steps (discrete)"
    else:
        d.idle["train.time_sampling_strategy"] = "discrete, as here"
    _old_policy(s, d)
    _advantages(s, d)
    _unread(s, d, "grpo", "pairs", "awm", "ema")


def _old_policy(s: Settings, d: Draft) -> None:
    if not s["train.off_policy"]:
        d.put("stage.algorithm.decay_type", 0, "train.off_policy")
        _ema(s, d)
        _unread(s, d, "old")
        return
    schedule = (
        s["train.ema_decay_schedule"],
        s["train.flat_steps"],
        s["train.ramp_rate"],
        s["train.ema_decay"],
    )
    names = (
        "train.off_policy",
        "train.ema_decay_schedule",
        "train.flat_steps",
        "train.ramp_rate",
        "train.ema_decay",
    )
    known = {("piecewise_linear", 0, 0.001, 0.5): 1, ("piecewise_linear", 75, 0.0075, 0.999): 2}
    if schedule in known:
        d.put("stage.algorithm.decay_type", known[schedule], *names)
    else:
        words = "decay_type 1 is min(0.001 t, 0.5), 2 is 0 to step 75 and then min(0.0075 (t - 75), 0.999)"
        d.near("stage.algorithm.decay_type", 1, "train.ema_decay_schedule", words)
        for name in names:
            d.idle.setdefault(name, "it is part of the old policy's schedule")
    d.idle["train.ema_update_interval"] = "the old policy moves after each batch"
    _unread(s, d, "old")


def _width(s: Settings) -> float:
    value: Any = s["train.timestep_range"]
    low: Any = 0.0
    high: Any = value
    if isinstance(value, list) and len(value) == 2:
        low, high = value
    try:
        return float(high) - float(low)
    except (TypeError, ValueError):
        raise s.refused("train.timestep_range", "a number, or two") from None


def _share(count: int, steps: int) -> float:
    """The fraction of which ``int(steps * fraction)`` is ``count``."""
    exact = round(min(count, steps) / steps, 4)
    return exact if int(steps * exact) == min(count, steps) else round((min(count, steps) + 0.5) / steps, 4)


def _awm(s: Settings, d: Draft) -> None:
    _shared(s, d)
    _solver(s, d)
    steps = s["train.num_inference_steps"]
    count = s["train.num_train_timesteps"] or max(1, int(steps * _width(s)))
    d.put("stage.algorithm.train_timesteps", count, "train.num_train_timesteps")
    d.put("stage.algorithm.time_type", s["train.time_sampling_strategy"], "train.time_sampling_strategy")
    if s["train.time_sampling_strategy"].startswith("discrete"):
        d.put("stage.algorithm.timestep_fraction", round(_width(s), 6), "train.timestep_range")
    else:
        d.idle["train.timestep_range"] = "times that are not discrete have no steps"
    weighting = str(s["train.awm_weighting"]).lower()
    d.put("stage.algorithm.weighting", weighting, "train.awm_weighting")
    if weighting == "ghuber":
        d.put("stage.algorithm.ghuber_power", s["train.ghuber_power"], "train.ghuber_power")
    else:
        d.idle["train.ghuber_power"] = "it is ghuber's"
    d.put("stage.algorithm.off_policy", s["train.off_policy"], "train.off_policy")
    d.put("stage.algorithm.clip_range", _limit(s, "train.clip_range"), "train.clip_range")
    limit = _limit(s, "train.adv_clip_range")
    d.put("stage.algorithm.advantage_max", limit, "train.adv_clip_range")
    _advantages(s, d)
    d.put("stage.algorithm.beta", s["train.kl_beta"], "train.kl_beta")
    d.put("stage.algorithm.ema_beta", s["train.ema_kl_beta"], "train.ema_kl_beta")
    if s["train.kl_beta"] or s["train.ema_kl_beta"]:
        d.put("stage.algorithm.kl_weighting", str(s["train.kl_weight"]).lower(), "train.kl_weight")
    else:
        d.idle["train.kl_weight"] = "kl_beta and ema_kl_beta are 0"
    d.idle["train.kl_type"] = "the squared distance of velocities, as v-based"
    _unread(s, d, "grpo", "pairs", "nft")
    if not (s["train.ema_kl_beta"] or s["train.off_policy"]):
        _ema(s, d)
    else:
        _moving(s, d)
    _unread(s, d, "old")


def _moving(s: Settings, d: Draft) -> None:
    """Write how AWM's old policy moves."""
    d.put("stage.algorithm.kl_ema_decay", s["train.ema_decay"], "train.ema_decay")
    linear = s["train.ema_decay_schedule"] == "linear"
    kind = "linear" if linear else "constant"
    d.put("stage.algorithm.kl_ema_decay_type", kind, "train.ema_decay_schedule")
    if linear:
        words = "linear is min(0.001 t, kl_ema_decay) after t steps; there it rises over warmup_steps"
        d.lost["train.warmup_steps"] = words
    d.idle["train.ema_update_interval"] = "the old policy moves after each batch"


def _dpo(s: Settings, d: Draft) -> None:
    _shared(s, d)
    _solver(s, d)
    d.put("stage.algorithm.beta", s["train.beta"], "train.beta")
    _density(s, d)
    count = s["train.num_train_timesteps"] or max(1, int(s["train.num_inference_steps"] * _width(s)))
    d.put("stage.algorithm.points_per_pair", count, "train.num_train_timesteps")
    d.lost["train.timestep_range"] = "times have no range: weighting_scheme is their density"
    for flag in ("train.global_std", "train.adv_clip_range", "train.advantage_aggregation"):
        d.idle[flag] = "a pair is the best and the worst of its group by the weighted sum of rewards"
    _ema(s, d)
    _unread(s, d, "grpo", "times", "awm", "nft", "old", "kl")


def _density(s: Settings, d: Draft) -> None:
    uniform = s["train.weighting_scheme"] == "uniform"
    d.put("stage.algorithm.weighting_scheme", "none" if uniform else "logit_normal", "train.weighting_scheme")
    d.put("stage.algorithm.logit_mean", s["train.logit_mean"], "train.logit_mean")
    d.put("stage.algorithm.logit_std", s["train.logit_std"], "train.logit_std")


def _sft(s: Settings, d: Draft) -> None:
    _density(s, d)
    if s["train.num_train_timesteps"] > 1:
        d.lost["train.num_train_timesteps"] = "a sample is trained at one time in a step"
    _ema(s, d)
    _unread(s, d, "online", "grpo", "times", "awm", "nft", "old", "kl", "pairs")


ALGORITHMS = {
    "grpo": Kind("flow_grpo", _grpo),
    "grpo-guard": Kind("flow_grpo", _grpo),
    "nft": Kind("diffusion_nft", _nft),
    "awm": Kind("awm", _awm),
    "dpo": Kind("dpo_online", _dpo),
    "sft": Kind("sft", _sft),
}
