"""Flow-GRPO's, DiffusionNFT's and AWM's formulas reproduce the published implementations' recorded numbers."""

import ast

import pytest
import torch
from parity_vectors import assert_close, ids, of_kind

from posttrain.algorithm import Items
from posttrain.algorithms._online import clipped_loss
from posttrain.algorithms.awm import AWM
from posttrain.algorithms.diffusion_nft import DiffusionNFT, implicit_losses, optimality
from posttrain.algorithms.flow_grpo import FlowGRPO
from posttrain.condition import Conditions
from posttrain.flow import interpolate
from posttrain.flow.advantages import group_advantages
from posttrain.model import FlowModel
from posttrain.policy import Policy


class Recorded(FlowModel):
    """A vector's transformer behind the engine's interface."""

    def __init__(self, network):
        self.transformer, self.device, self.shift, self.divisor = network, torch.device("cpu"), 3.0, 1

    def velocity(self, latents, sigma, condition):
        return self.transformer(
            hidden_states=latents,
            timestep=1000 * sigma,
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]

    def unused(self, *args, **kwargs):
        raise AssertionError("not in these tests")

    sigmas = encode_prompts = posterior = latents = latent_shape = decode = unused
    save = save_lora = load_weights = unused


def policy_of(v, weights="weight.", **roles):
    policy = Policy(Recorded(v.transformer(weights)))
    for role, prefix in roles.items():
        tensors = v.under(prefix)  # the position embedding is a buffer, the same in all
        policy.add_role(role, {name: tensors[name] for name in policy.parameters})
    return policy


def conditions_of(v, null_embeds, null_pooled):
    embeds = torch.cat([null_embeds, v["prompt_embeds"]])
    return Conditions({"embeds": embeds, "pooled": torch.cat([null_pooled, v["pooled"]])})


@pytest.mark.parametrize("v", of_kind("group_advantages"), ids=ids)
@pytest.mark.parametrize("global_std", [True, False])
def test_parity_group_advantages(v, global_std):
    got = group_advantages(v["rewards"], v["prompt_index"], global_std=global_std)
    assert_close(got, v[f"advantages.global_std_{global_std}"], 1e-5)


@pytest.mark.parametrize("v", of_kind("flow_grpo_step"), ids=ids)
def test_parity_flow_grpo_step(v):
    grpo = FlowGRPO(
        num_steps=int(v.meta["steps"]),
        noise_level=v.number("noise_level"),
        guidance_scale=v.number("cfg"),
        clip_range=v.number("clip_range"),
        beta=v.number("beta"),
        adv_clip_max=v.number("adv_clip_max"),
    )
    policy = policy_of(v, reference="ref_weight.")
    conditions = conditions_of(v, v["null_embeds"], v["null_pooled"])
    sigmas, n = v["sigmas"], len(v["pooled"])
    prompt = torch.arange(1, n + 1)
    x = v["x_init"]
    stored = {}
    for i in range(int(v.meta["steps"])):
        sigma, sigma_next, sigma_max = (s.expand(n) for s in (sigmas[i], sigmas[i + 1], sigmas[1]))
        # the recorded rollout is the reference's
        with policy.using("reference"):
            velocity = policy.guided_velocity(x, sigma, prompt, conditions, grpo.guidance_scale)
        assert_close(velocity, v[f"step.{i}.velocity"], 1e-4)
        mean, std = grpo._step(x, velocity, sigma, sigma_next, sigma_max)
        assert_close(mean, v[f"step.{i}.mean"], 1e-4)
        following = mean + std * v[f"draw.noise.{i}"]
        assert_close(following, v[f"step.{i}.next"], 1e-4)
        log_prob = grpo._log_prob(following, mean, std)
        assert_close(log_prob, v[f"step.{i}.log_prob"], 1e-4)
        stored[i] = {
            "latents": x,
            "next_latents": v[f"step.{i}.next"],
            "sigma": sigma,
            "sigma_next": sigma_next,
            "sigma_max": sigma_max,
            "log_prob": v[f"step.{i}.log_prob"],
            "advantage": v["advantages"].clamp(-grpo.adv_clip_max, grpo.adv_clip_max),
            "prompt_index": prompt,
            "sample_index": torch.arange(n),
        }
        x = v[f"step.{i}.next"]
    for i in sorted({int(k.split(".")[1]) for k in v.tensors if k.startswith("loss.")}):
        policy.model.transformer.zero_grad()
        items = Items(torch.ones(n), stored[i], conditions)
        losses = grpo.loss(grpo.with_frozen_velocities(items, policy), policy)
        losses.per_item.mean().backward()
        assert_close(losses.metrics["ratio"], v[f"loss.{i}.ratio"], 1e-5)
        assert_close(losses.metrics["policy_loss"].mean(), v[f"loss.{i}.policy"], 1e-4)
        assert_close(losses.metrics["kl"].mean(), v[f"loss.{i}.kl"], 1e-4)
        for name, gradient in v.under(f"loss.{i}.grad.").items():
            assert_close(policy.parameters[name].grad, gradient, 1e-4)
        norm = torch.stack([p.grad.norm() for p in policy.trained.values() if p.grad is not None]).norm()
        assert_close(norm, v[f"loss.{i}.grad_norm"], 1e-4)


@pytest.mark.parametrize("v", of_kind("diffusion_nft_step"), ids=ids)
def test_parity_diffusion_nft_step(v):
    nft = DiffusionNFT(
        beta=v.number("beta"), kl_weight=v.number("kl_beta"), adv_clip_max=v.number("adv_clip_max")
    )
    policy = policy_of(v, old="old_weight.", reference="ref_weight.")
    n, config = len(v["x0"]), ast.literal_eval(v.meta["config"])
    null = torch.zeros(1, v["prompt_embeds"].shape[1], config["joint_attention_dim"])
    conditions = conditions_of(v, null, torch.zeros(1, config["pooled_projection_dim"]))
    sigma = v["timesteps"] / 1000
    latents = torch.lerp(v["x0"], v["noise"], sigma.view(-1, 1, 1, 1))
    advantage = v["advantages"].clamp(-nft.adv_clip_max, nft.adv_clip_max)
    assert_close(optimality(advantage, "all", nft.adv_clip_max), v["r"], 1e-5)
    fields = {"latents": latents, "x0": v["x0"], "sigma": sigma, "advantage": advantage}
    items = Items(
        torch.ones(n),
        {**fields, "prompt_index": torch.arange(1, n + 1), "sample_index": torch.arange(n)},
        conditions,
    )
    losses = nft.loss(nft.with_frozen_velocities(items, policy), policy)
    losses.per_item.mean().backward()
    assert_close(losses.metrics["positive_loss"], v["positive_loss"], 1e-4)
    assert_close(losses.metrics["negative_loss"], v["negative_loss"], 1e-4)
    assert_close(losses.metrics["policy_loss"].mean(), v["policy_loss"], 1e-4)
    assert_close(losses.metrics["kl"].mean(), v["kl"], 1e-4)
    assert_close(losses.per_item.mean(), v["loss"], 1e-4)
    for name, gradient in v.under("grad.").items():
        assert_close(policy.parameters[name].grad, gradient, 1e-4)
    positive, negative = implicit_losses(v["v"], v["v_old"], latents, v["x0"], sigma, nft.beta)
    assert_close(positive, v["positive_loss"], 1e-5)
    assert_close(negative, v["negative_loss"], 1e-5)


def awm_of(v):
    assert v.meta["loss_type"] == "exp_first", "a ratio for each noise level, not for their mean"
    weighting = {"t**2": "t_squared"}.get(v.meta["weighting"], v.meta["weighting"].lower())
    numbers = ["beta", "ema_beta", "clip_range", "advantage_max", "adv_clip_max"]
    return AWM(
        train_timesteps=int(v.meta["steps"]),
        weighting=weighting,
        kl_weighting=v.meta["kl_weight"].lower(),
        **({"ghuber_power": v.number("ghuber_power")} if weighting == "ghuber" else {}),
        **{name: v.number(name) for name in numbers},
    )


@pytest.mark.parametrize("v", of_kind("awm_step"), ids=ids)
def test_parity_awm_step(v):
    awm, config = awm_of(v), ast.literal_eval(v.meta["config"])
    averaged = {"old": "ema_weight."} if awm.ema_beta else {}
    policy = policy_of(v, "old_weight.", reference="ref_weight.", **averaged)
    null = torch.zeros(1, v["prompt_embeds"].shape[1], config["joint_attention_dim"])
    conditions = conditions_of(v, null, torch.zeros(1, config["pooled_projection_dim"]))
    n, steps = len(v["x0"]), awm.train_timesteps
    x0, sample = v["x0"].repeat(steps, 1, 1, 1), torch.arange(n).repeat(steps)
    fields = {
        "latents": interpolate(x0, v["noise"], v["sigmas"]), "target": v["noise"] - x0, "sigma": v["sigmas"],
        "advantage": v["advantages"].clamp(-awm.adv_clip_max, awm.adv_clip_max)[sample],
        "prompt_index": 1 + sample, "sample_index": sample,
    }  # fmt: skip
    items = awm.with_frozen_velocities(Items(torch.ones(n * steps), fields, conditions), policy)
    assert_close(items.old_log_prob, v["old_log_prob"], 1e-4)
    policy.model.transformer.load_state_dict(v.under("weight."))
    losses = awm.loss(items, policy)
    losses.per_item.mean().backward()
    assert_close(losses.metrics["log_prob"], v["log_prob"], 1e-4)
    assert_close(losses.metrics["ratio"], v["ratio"], 1e-4)
    assert_close(losses.metrics["policy_loss"].mean(), v["policy_loss"], 1e-4)
    assert_close(losses.metrics["kl"].mean(), v["kl"], 1e-4)
    if awm.ema_beta:
        assert_close(losses.metrics["ema_kl"].mean(), v["ema_kl"], 1e-4)
    assert_close(losses.per_item.mean(), v["loss"], 1e-4)
    for name, gradient in v.under("grad.").items():
        assert_close(policy.parameters[name].grad, gradient, 1e-4)
    norm = torch.stack([p.grad.norm() for p in policy.trained.values() if p.grad is not None]).norm()
    assert_close(norm, v["grad_norm"], 1e-4)


@pytest.mark.parametrize("v", of_kind("awm_step"), ids=ids)
def test_parity_awm_ratio_and_loss_of_the_recorded_log_probabilities(v):
    awm, steps = awm_of(v), int(v.meta["steps"])
    ratio = (v["log_prob"] - v["old_log_prob"]).exp()
    assert_close(ratio, v["ratio"], 1e-5)
    advantage = v["advantages"].clamp(-awm.adv_clip_max, awm.adv_clip_max) / awm.adv_clip_max
    loss = clipped_loss(ratio, (advantage * awm.advantage_max).repeat(steps), awm.clip_range).mean()
    assert_close(loss, v["policy_loss"], 1e-5)
    kl = awm.beta * v["kl"] + (awm.ema_beta * v["ema_kl"] if awm.ema_beta else 0)
    assert_close(v["policy_loss"] + kl, v["loss"], 1e-5)
