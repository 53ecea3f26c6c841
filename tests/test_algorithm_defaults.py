"""Every published hyper-parameter: its default, and the values just inside and outside its range."""

import math
from types import SimpleNamespace

import pytest
import torch
from by_hand import conditions
from pydantic import ValidationError

from posttrain.algorithm import Batch
from posttrain.algorithms._flow_matching import FlowMatching
from posttrain.algorithms._online import Online
from posttrain.algorithms.awm import AWM
from posttrain.algorithms.diffusion_nft import DiffusionNFT
from posttrain.algorithms.dpo import DPO
from posttrain.algorithms.dpo_online import DPOOnline
from posttrain.algorithms.flow_grpo import FlowGRPO
from posttrain.algorithms.reflexflow import ReflexFlow
from posttrain.algorithms.sft import SFT
from posttrain.algorithms.soar import SOAR

MATCHING = {
    "weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "cond_dropout": 0.0,
}  # fmt: skip
ONLINE = {
    "group_size": 24, "num_steps": 10, "timestep_fraction": 0.99, "global_std": True, "adv_clip_max": 5.0,
    "reward_mixing": "rewards",
}  # fmt: skip
DEFAULTS = {
    SFT: {"type": "sft", **MATCHING},
    SOAR: {
        "type": "soar", **MATCHING, "lambda_aux": 1.0, "num_rollout_paths": 1, "trajectory_length": 6,
        "sde_rollout_type": "flow_sde", "sde_noise_scale": 0.5, "cfg_scale_sampling": 4.5,
        "num_sampling_steps": 40, "sigma_floor": 0.02,
    },
    ReflexFlow: {
        "type": "reflexflow", **MATCHING, "adr_weight": 10.0, "fc_weight": 1.0, "fc_alpha": 1.0, "step_range": 1.0,
    },
    FlowGRPO: {
        "type": "flow_grpo", **ONLINE, "sde_type": "flow_sde", "noise_level": 0.7, "guidance_scale": 4.5,
        "sde_window_size": 0, "sde_window_range": None, "init_same_noise": False, "clip_range": 1e-4, "beta": 0.04,
        "kl_type": "without_dt", "grpo_guard": False, "drop_zero_advantage": True,
    },
    DiffusionNFT: {
        "type": "diffusion_nft", **ONLINE, "solver": "dpm2", "guidance_scale": 1.0, "beta": 0.1, "kl_weight": 1e-4,
        "adv_mode": "all", "decay_type": 1,
    },
    AWM: {
        "type": "awm", **ONLINE, "num_steps": 14, "timestep_fraction": 0.9, "solver": "dpm2", "guidance_scale": 1.0,
        "off_policy": False, "train_timesteps": 6, "time_type": "discrete_wo_init", "weighting": "ghuber",
        "ghuber_power": 0.25, "advantage_max": 1.0, "clip_range": 1.0, "beta": 0.003, "ema_beta": 1.0,
        "kl_weighting": "uniform", "kl_ema_decay": 0.3, "kl_ema_decay_type": "linear",
    },
    DPO: {"type": "dpo", **MATCHING, "beta": 2000.0},
    DPOOnline: {
        "type": "dpo_online", **MATCHING, "group_size": 24, "num_steps": 40, "solver": "euler", "guidance_scale": 4.5,
        "points_per_pair": 39, "beta": 100.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("algorithm", DEFAULTS, ids=lambda a: a.__name__)
def test_the_defaults_are_the_published_ones(algorithm):
    assert algorithm().model_dump() == DEFAULTS[algorithm]
    assert algorithm.variants[DEFAULTS[algorithm]["type"]] is algorithm


def test_what_they_need():
    assert FlowMatching.needs == "images"
    assert Online.needs == "prompts"
    assert Online.uses_rewards
    assert not FlowMatching.uses_rewards
    assert SFT().samples_per_prompt == 1
    assert FlowGRPO(group_size=6).samples_per_prompt == DiffusionNFT(group_size=6).samples_per_prompt == 6
    assert SFT().roles == SOAR().roles == ReflexFlow().roles == FlowGRPO(beta=0.0).roles == frozenset()
    assert FlowGRPO().roles == {"reference"}
    assert DiffusionNFT().roles == {"old", "reference"}
    assert DiffusionNFT(kl_weight=0.0).roles == {"old"}
    assert AWM().roles == {"old", "reference"}
    assert AWM(beta=0.0).roles == AWM(beta=0.0, ema_beta=0.0, off_policy=True).roles == {"old"}
    assert AWM(ema_beta=0.0).roles == {"reference"}
    assert AWM(beta=0.0, ema_beta=0.0).roles == frozenset()
    assert (DPO.needs, DPO.uses_rewards, DPO().samples_per_prompt) == ("pairs", False, 1)
    assert (DPOOnline.needs, DPOOnline.uses_rewards) == ("prompts", True)
    assert DPOOnline(group_size=6).samples_per_prompt == 6
    assert DPO().roles == DPOOnline().roles == {"reference"}


def test_the_batches_of_online_algorithms_have_no_images_yet():
    batch = Batch(torch.ones(2, 1, 1, 2), torch.tensor([1, 1]), conditions())
    for algorithm in (FlowGRPO(), DiffusionNFT(), AWM(), DPOOnline()):
        assert algorithm.as_given(batch).latents.is_meta
        assert algorithm.as_given(batch).latents.shape == (2, 1, 1, 2)
    assert SFT().as_given(batch) is batch


RANGES = [
    (SFT, "logit_std", [1e-6, 3.0], [0.0]),
    (SFT, "cond_dropout", [0.0, 1.0], [-1e-6, 1 + 1e-6]),
    (SOAR, "lambda_aux", [0.0, 5.0], [-1e-6]),
    (SFT, "mode_scale", [-1.0, 1.75], [-1 - 1e-6, 1.76]),
    (SOAR, "num_rollout_paths", [1, 9], [0]),
    (SOAR, "trajectory_length", [0, 9], [-1]),
    (SOAR, "sde_noise_scale", [0.0, 2.0], [-1e-6]),
    (SOAR, "cfg_scale_sampling", [0.0, 9.0], [-1e-6]),
    (SOAR, "num_sampling_steps", [1, 99], [0]),
    (SOAR, "sigma_floor", [0.0, 0.999], [-1e-6, 1.0]),
    (ReflexFlow, "adr_weight", [0.0, 99.0], [-1e-6]),
    (ReflexFlow, "fc_weight", [1e-6, 99.0], [0.0]),
    (ReflexFlow, "fc_alpha", [0.0, 1e6], [-1e-6]),
    (ReflexFlow, "step_range", [1e-6, 1.0], [0.0, 1 + 1e-6]),
    (DiffusionNFT, "group_size", [2, 99], [1]),
    (DiffusionNFT, "num_steps", [2, 10_000], [1, 10_001]),
    (DiffusionNFT, "timestep_fraction", [1e-6, 1.0], [0.0, 1 + 1e-6]),
    (DiffusionNFT, "adv_clip_max", [1e-6, 99.0], [0.0]),
    (DiffusionNFT, "guidance_scale", [0.0, 9.0], [-1e-6]),
    (DiffusionNFT, "beta", [1e-6, 1.0], [0.0, 1 + 1e-6]),
    (DiffusionNFT, "kl_weight", [0.0, 9.0], [-1e-6]),
    (DiffusionNFT, "decay_type", [0, 1, 2], [3]),
    (FlowGRPO, "noise_level", [1e-6, 9.0], [0.0]),
    (FlowGRPO, "guidance_scale", [0.0, 9.0], [-1e-6]),
    (FlowGRPO, "sde_window_size", [0, 9], [-1]),
    (FlowGRPO, "clip_range", [1e-9, 9.0], [0.0]),
    (FlowGRPO, "beta", [0.0, 9.0], [-1e-6]),
    (FlowGRPO, "sde_window_range", [], [[0], [0, 5, 6]]),
    (AWM, "num_steps", [3, 10_000], [1, 10_001]),
    (AWM, "timestep_fraction", [0.15, 1.0], [0.0, 1 + 1e-6]),
    (AWM, "guidance_scale", [0.0, 9.0], [-1e-6]),
    (AWM, "train_timesteps", [1, 1000], [0, 1001]),
    (AWM, "ghuber_power", [1e-6, 1.0], [0.0, 1 + 1e-6]),
    (AWM, "advantage_max", [1e-6, 9.0], [0.0]),
    (AWM, "clip_range", [1e-6, 9.0], [0.0]),
    (AWM, "beta", [0.0, 9.0], [-1e-6]),
    (AWM, "ema_beta", [0.0, 9.0], [-1e-6]),
    (AWM, "kl_ema_decay", [0.0, 1.0], [-1e-6, 1 + 1e-6]),
    (DPO, "beta", [1e-6, 9999.0], [0.0]),
    (DPOOnline, "beta", [1e-6, 9999.0], [0.0]),
    (DPOOnline, "group_size", [2, 99], [1]),
    (DPOOnline, "num_steps", [2, 10_000], [1, 10_001]),
    (DPOOnline, "guidance_scale", [0.0, 9.0], [-1e-6]),
    (DPOOnline, "points_per_pair", [1, 1000], [0, 1001]),
]


BESIDE = {"sde_noise_scale": {"num_rollout_paths": 2}, "mode_scale": {"weighting_scheme": "mode"}}
"""What else must be set for an option to have an effect."""


@pytest.mark.parametrize(
    ("algorithm", "name", "inside", "outside"), RANGES, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_the_ranges(algorithm, name, inside, outside):
    for value in inside:
        assert getattr(algorithm(**{name: value}, **BESIDE.get(name, {})), name) == value
    for value in outside:
        with pytest.raises(ValidationError) as error:
            algorithm.model_validate({name: value})
        assert [e["loc"][0] for e in error.value.errors()] == [name]


@pytest.mark.parametrize(
    ("steps", "fraction", "trained"), [(10, 0.99, 9), (10, 0.5, 5), (25, 0.99, 24), (4, 0.25, 1)]
)
def test_trained_steps(steps, fraction, trained):
    for algorithm in (FlowGRPO, DiffusionNFT):
        assert algorithm(num_steps=steps, timestep_fraction=fraction).trained_steps == trained


def refused(**settings):
    """The field that is to blame, and the words."""
    with pytest.raises(ValidationError) as error:
        FlowGRPO.model_validate(settings)
    (found,) = error.value.errors()
    return [*found["loc"], *found.get("ctx", {}).get("path", ())], found["msg"]


@pytest.mark.parametrize(
    ("algorithm", "settings", "name", "why"),
    [
        (SFT, {"weighting_scheme": "mode", "logit_mean": 0.5}, "logit_mean", "weighting_scheme 'mode'"),
        (DPO, {"weighting_scheme": "cosmap", "logit_std": 2.0}, "logit_std", "weighting_scheme 'cosmap'"),
        (SFT, {"mode_scale": 1.0}, "mode_scale", "weighting_scheme 'logit_normal'"),
        (SOAR, {"sde_rollout_type": "cps"}, "sde_rollout_type", "one rollout path"),
        (SOAR, {"sde_noise_scale": 0.1}, "sde_noise_scale", "one rollout path"),
        (
            SOAR,
            {"num_rollout_paths": 2, "sde_rollout_type": "sde", "sde_noise_scale": 0.1},
            "sde_noise_scale",
            "'sde', whose noise sigma decides",
        ),
        (ReflexFlow, {"adr_weight": 0.0, "fc_alpha": 0.0, "step_range": 0.5}, "step_range", "as in SFT"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(algorithm, settings, name, why):
    with pytest.raises(ValidationError) as error:
        algorithm.model_validate(settings)
    (found,) = error.value.errors()
    assert found["ctx"]["path"] == (name,)
    assert "has no effect" in found["msg"]
    assert why in found["msg"]
    algorithm.model_validate(settings | {name: algorithm.model_fields[name].default})


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 2 / (math.pi - 2)])
def test_the_mode_density_stays_within_0_and_1_and_falls_with_its_number(scale):
    sft, u = SFT(weighting_scheme="mode", mode_scale=scale), torch.linspace(0, 1, 1001)
    t = sft.density(SimpleNamespace(draws=SimpleNamespace(uniform=lambda purpose: u)))
    assert t.min() >= -1e-6
    assert t.max() <= 1 + 1e-6
    assert (t.diff() <= 1e-6).all()


@pytest.mark.parametrize("name", ["ode", "ODE", "euler", "dpm1", "dpm2", "flow"])
def test_a_deterministic_sampler_is_refused_with_a_hint(name):
    where, words = refused(sde_type=name)
    assert where == ["sde_type"]
    assert f"{name!r} is deterministic" in words
    assert "deterministic" not in refused(sde_type="other")[1]
    assert "deterministic" not in refused(sde_type=3)[1]


def test_which_steps_can_be_trained():
    where, words = refused(timestep_fraction=1.0)
    assert where == ["timestep_fraction"]
    assert "1 of 10 steps includes the last one" in words
    where, words = refused(timestep_fraction=0.09)
    assert where == ["timestep_fraction"]
    assert "0.09 of 10 steps trains none" in words
    assert FlowGRPO(timestep_fraction=0.1).window_range == (0, 1)
    assert FlowGRPO().window_range == (0, 9)
    assert FlowGRPO(num_steps=4, timestep_fraction=0.5).window_range == (0, 2)
    # a window never reaches the last step, whatever the fraction
    assert FlowGRPO(timestep_fraction=1.0, sde_window_size=2).window_range == (0, 9)
    assert FlowGRPO(sde_window_size=2, sde_window_range=[3, 7]).window_range == (3, 7)


def test_the_windows_range():
    assert refused(sde_window_range=[0, 5]) == (
        ["sde_window_range"],
        "has no effect without an sde_window_size",
    )
    for bad in ([-1, 3], [3, 3], [4, 3]):
        where, words = refused(sde_window_size=1, sde_window_range=bad)
        assert where == ["sde_window_range"]
        assert "must rise, from 0 or more" in words
    where, words = refused(sde_window_size=1, sde_window_range=[0, 10])
    assert where == ["sde_window_range"]
    assert "its end 10 is beyond 9" in words
    where, words = refused(sde_window_size=1, sde_window_range=[0, 9], timestep_fraction=0.5)
    assert where == ["timestep_fraction"]
    assert "has no effect beside an sde_window_range" in words
    FlowGRPO(sde_window_size=1, sde_window_range=[0, 9], timestep_fraction=0.99)
    FlowGRPO(sde_window_size=4, sde_window_range=[2, 6])
    where, words = refused(sde_window_size=5, sde_window_range=[2, 6])
    assert where == ["sde_window_size"]
    assert "a window of 5 steps does not fit into the 4 steps [2, 6)" in words
    FlowGRPO(sde_window_size=9)
    assert refused(sde_window_size=10)[0] == ["sde_window_size"]


def test_a_kind_of_kl_needs_a_kl():
    where, words = refused(beta=0.0, kl_type="with_dt")
    assert where == ["kl_type"]
    assert "has no effect where beta" in words
    FlowGRPO(beta=0.0, kl_type="without_dt")
    FlowGRPO(beta=0.1, kl_type="with_dt")
