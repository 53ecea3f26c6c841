"""Writes the algorithm of each ``trainer_type`` of Flow-Factory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from posttrain.importing.draft import Draft
from posttrain.importing.flags import Settings
from posttrain.importing.flow_factory_shared import (
    limit_of,
    put_advantages,
    put_density,
    put_ema,
    put_rollout,
    put_solver,
    share_of,
    trained_times,
    unread,
    width_of,
)

SDE = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance", "CPS": "cps"}
DECAYS = {("piecewise_linear", 0, 0.001, 0.5): 1, ("piecewise_linear", 75, 0.0075, 0.999): 2}
"""Schedule, flat steps, ramp and limit of an old policy -> ``decay_type``."""


@dataclass(frozen=True)
class Kind:
    """One of posttrain's algorithms, and what writes its fields."""

    ours: str
    put: Callable[[Settings, Draft], None]


def _grpo(s: Settings, d: Draft) -> None:
    if s["scheduler.dynamics_type"] == "ODE":
        words = "an ODE's steps have no probability to train: Flow-SDE, CPS or Dance-SDE"
        raise s.refused("scheduler.dynamics_type", words)
    put_rollout(d)
    d.put("stage.algorithm.sde_type", SDE[s["scheduler.dynamics_type"]], "scheduler.dynamics_type")
    d.same({"stage.algorithm.noise_level": "scheduler.noise_level", "stage.algorithm.beta": "train.kl_beta"})
    steps, last = s["scheduler.sde_steps"], s["train.num_inference_steps"] - 1
    size = s["scheduler.num_sde_steps"]
    if steps and not all(isinstance(step, int) for step in steps):
        raise s.refused("scheduler.sde_steps", "a list of whole numbers")
    first, end = (min(steps), min(max(steps) + 1, last)) if steps else (0, last)
    d.put("stage.algorithm.sde_window_size", min(size, end - first), "scheduler.num_sde_steps")
    d.put("stage.algorithm.sde_window_range", [first, end], "scheduler.sde_steps")
    if steps and (also := [str(step) for step in range(first, end) if step not in steps]):
        d.lost["scheduler.sde_steps"] = f"a window is consecutive: it also has steps {', '.join(also)}"
    d.differs.append("the stochastic steps are consecutive, drawn for a batch; there singly, from sde_steps")
    d.put("stage.algorithm.clip_range", limit_of(s, "train.clip_range"), "train.clip_range")
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
    put_advantages(s, d)
    put_ema(s, d)
    unread(s, d, "times", "pairs", "awm", "nft", "old")


def _nft(s: Settings, d: Draft) -> None:
    put_rollout(d)
    put_solver(s, d)
    d.same({"stage.algorithm.beta": "train.nft_beta", "stage.algorithm.kl_weight": "train.kl_beta"})
    d.idle["train.kl_type"] = "the squared distance of velocities, as v-based"
    count, steps = trained_times(s), s["train.num_inference_steps"]
    share = share_of(count, steps)
    d.put("stage.algorithm.timestep_fraction", share, "train.num_train_timesteps", note=f"{count} of {steps}")
    d.lost["train.timestep_range"] = "the trained times are drawn from all steps of the rollout"
    if s["train.time_sampling_strategy"] != "discrete":
        d.lost["train.time_sampling_strategy"] = "times are those of the rollout's steps (discrete)"
    else:
        d.idle["train.time_sampling_strategy"] = "discrete, as here"
    _old_policy(s, d)
    put_advantages(s, d)
    unread(s, d, "grpo", "pairs", "awm", "ema")


def _old_policy(s: Settings, d: Draft) -> None:
    if not s["train.off_policy"]:
        d.put("stage.algorithm.decay_type", 0, "train.off_policy")
        put_ema(s, d)
        unread(s, d, "old")
        return
    names = ("train.ema_decay_schedule", "train.flat_steps", "train.ramp_rate", "train.ema_decay")
    schedule = tuple(s[name] for name in names)
    if schedule in DECAYS:
        d.put("stage.algorithm.decay_type", DECAYS[schedule], "train.off_policy", *names)
    else:
        words = "decay_type 1 is min(0.001 t, 0.5), 2 is 0 to step 75 and then min(0.0075 (t - 75), 0.999)"
        d.near("stage.algorithm.decay_type", 1, "train.ema_decay_schedule", words)
        d.idle |= dict.fromkeys(("train.off_policy", *names), "it is part of the old policy's schedule")
    d.idle["train.ema_update_interval"] = "the old policy moves after each batch"
    unread(s, d, "old")


def _awm(s: Settings, d: Draft) -> None:
    put_rollout(d)
    put_solver(s, d)
    d.put("stage.algorithm.train_timesteps", trained_times(s), "train.num_train_timesteps")
    d.same(
        {
            "stage.algorithm.time_type": "train.time_sampling_strategy",
            "stage.algorithm.off_policy": "train.off_policy",
            "stage.algorithm.beta": "train.kl_beta",
            "stage.algorithm.ema_beta": "train.ema_kl_beta",
        }
    )
    if s["train.time_sampling_strategy"].startswith("discrete"):
        d.put("stage.algorithm.timestep_fraction", round(width_of(s), 6), "train.timestep_range")
    else:
        d.idle["train.timestep_range"] = "times that are not discrete have no steps"
    weighting = str(s["train.awm_weighting"]).lower()
    d.put("stage.algorithm.weighting", weighting, "train.awm_weighting")
    if weighting == "ghuber":
        d.put("stage.algorithm.ghuber_power", s["train.ghuber_power"], "train.ghuber_power")
    else:
        d.idle["train.ghuber_power"] = "only the weighting ghuber reads it"
    d.put("stage.algorithm.clip_range", limit_of(s, "train.clip_range"), "train.clip_range")
    d.put("stage.algorithm.advantage_max", limit_of(s, "train.adv_clip_range"), "train.adv_clip_range")
    put_advantages(s, d)
    if s["train.kl_beta"] or s["train.ema_kl_beta"]:
        d.put("stage.algorithm.kl_weighting", str(s["train.kl_weight"]).lower(), "train.kl_weight")
    else:
        d.idle["train.kl_weight"] = "kl_beta and ema_kl_beta are 0"
    d.idle["train.kl_type"] = "the squared distance of velocities, as v-based"
    unread(s, d, "grpo", "pairs", "nft")
    if s["train.ema_kl_beta"] or s["train.off_policy"]:
        _moving(s, d)
    else:
        put_ema(s, d)
    unread(s, d, "old")


def _moving(s: Settings, d: Draft) -> None:
    """Write how AWM's old policy moves."""
    d.put("stage.algorithm.kl_ema_decay", s["train.ema_decay"], "train.ema_decay")
    kind = "linear" if s["train.ema_decay_schedule"] == "linear" else "constant"
    d.put("stage.algorithm.kl_ema_decay_type", kind, "train.ema_decay_schedule")
    if kind == "linear":
        words = "linear is min(0.001 t, kl_ema_decay) after t steps; there it rises over warmup_steps"
        d.lost["train.warmup_steps"] = words
    d.idle["train.ema_update_interval"] = "the old policy moves after each batch"


def _dpo(s: Settings, d: Draft) -> None:
    put_rollout(d)
    put_solver(s, d)
    d.put("stage.algorithm.beta", s["train.beta"], "train.beta")
    put_density(s, d)
    d.put("stage.algorithm.points_per_pair", trained_times(s), "train.num_train_timesteps")
    d.lost["train.timestep_range"] = "times have no range: weighting_scheme is their density"
    for flag in ("train.global_std", "train.adv_clip_range", "train.advantage_aggregation"):
        d.idle[flag] = "a pair is the best and the worst of its group by the weighted sum of rewards"
    put_ema(s, d)
    unread(s, d, "grpo", "times", "awm", "nft", "old", "kl")


def _sft(s: Settings, d: Draft) -> None:
    put_density(s, d)
    if s["train.num_train_timesteps"] > 1:
        d.lost["train.num_train_timesteps"] = "a sample is trained at one time in a step"
    put_ema(s, d)
    unread(s, d, "online", "grpo", "times", "awm", "nft", "old", "kl", "pairs")


ALGORITHMS = {
    "grpo": Kind("flow_grpo", _grpo),
    "grpo-guard": Kind("flow_grpo", _grpo),
    "nft": Kind("diffusion_nft", _nft),
    "awm": Kind("awm", _awm),
    "dpo": Kind("dpo_online", _dpo),
    "sft": Kind("sft", _sft),
}
