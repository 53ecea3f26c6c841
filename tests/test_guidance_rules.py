"""A guidance scale acts by the model's own rule, and a plan counts the forwards that the rule needs."""

import pytest
import torch
from by_hand import conditions as table
from by_hand import linear_policy

from posttrain.algorithms.awm import AWM
from posttrain.algorithms.diffusion_nft import DiffusionNFT
from posttrain.algorithms.dpo_online import DPOOnline
from posttrain.algorithms.flow_grpo import FlowGRPO
from posttrain.algorithms.reflexflow import ReflexFlow
from posttrain.algorithms.soar import SOAR
from posttrain.engine.rehearsal import Rehearsal, StandIn, rehearse
from posttrain.errors import ModelError
from posttrain.flow.guidance import CLASSIFIER_FREE, EMBEDDED, UNGUIDED, ClassifierFree

X, SIGMA, PROMPT = torch.ones(2, 1, 1, 2), torch.tensor([0.3, 0.6]), torch.tensor([1, 2])


def guided_by(rule, scale):
    """The velocity under ``rule``, and the conditions that the model was given."""
    policy, seen = linear_policy(), []
    policy.model.guidance_rule, own = rule, policy.model.velocity
    policy.model.velocity = lambda x, s, condition: seen.append(condition) or own(x, s, condition)
    with torch.no_grad():
        return policy.guided_velocity(X, SIGMA, PROMPT, table(), scale), seen, policy.forward_equivalents


def test_classifier_free_guidance_costs_a_second_forward_unless_it_is_1():
    plain, seen, cost = guided_by(CLASSIFIER_FREE, 1.0)
    assert (len(seen), cost, seen[0].keys()) == (1, 2, {"c"})
    guided, seen, cost = guided_by(CLASSIFIER_FREE, 3.0)
    assert (cost, len(seen[0]["c"])) == (4, 4)
    # v = w x + sigma + c, and the empty prompt's c is 0.1: 0.1 + 3 (c - 0.1) instead of c
    torch.testing.assert_close(
        guided - plain, 2 * (torch.tensor([1.0, -2.0]) - 0.1).view(2, 1, 1, 1).expand(X.shape)
    )


def test_an_embedded_scale_is_an_input_of_the_network_and_costs_nothing():
    plain, *_ = guided_by(CLASSIFIER_FREE, 1.0)
    found, seen, cost = guided_by(EMBEDDED, 3.5)
    assert torch.equal(seen[0]["guidance"], torch.tensor([3.5, 3.5]))
    assert (cost, torch.equal(found, plain)) == (2, True)


def test_a_model_without_guidance_refuses_a_scale():
    assert guided_by(UNGUIDED, 1.0)[2] == 2
    with pytest.raises(ModelError, match=r"guidance 3\.5: this model was distilled to need none; give 1"):
        guided_by(UNGUIDED, 3.5)


def test_a_rule_may_combine_the_two_velocities_in_its_own_way():
    class Halved(ClassifierFree):
        def combined(self, v_cond, v_uncond, scale):
            return super().combined(v_cond, v_uncond, scale) / 2

    assert torch.equal(guided_by(Halved(), 3.0)[0], guided_by(CLASSIFIER_FREE, 3.0)[0] / 2)


@pytest.mark.parametrize("algorithm", [SOAR(), FlowGRPO(group_size=2, num_steps=4)])
def test_a_plan_counts_the_forwards_that_the_rule_needs(algorithm):
    free, embedded = rehearse(algorithm), rehearse(algorithm, EMBEDDED)
    assert embedded.rollout == free.rollout / 2
    assert embedded.rows_without == free.rows_without / 2


@pytest.mark.parametrize(
    "algorithm",
    [
        DiffusionNFT(group_size=2, num_steps=3, guidance_scale=3.5),
        AWM(group_size=2, num_steps=4, guidance_scale=3.5),
        FlowGRPO(group_size=2, num_steps=3, guidance_scale=3.5),
        DPOOnline(group_size=2, num_steps=3, guidance_scale=3.5, points_per_pair=1),
    ],
)
def test_online_algorithms_train_an_embedded_scale_at_that_of_their_rollout(algorithm, monkeypatch):
    """Without an embedded scale, DiffusionNFT, AWM and DPO train without guidance, in one forward for each item."""
    seen, own = [], StandIn.velocity

    def velocity(self, latents, sigma, condition):
        seen.append((torch.is_grad_enabled(), condition.get("guidance")))
        return own(self, latents, sigma, condition)

    monkeypatch.setattr(StandIn, "velocity", velocity)
    Rehearsal(algorithm, 1, EMBEDDED)
    assert {gradients for gradients, _ in seen} == {False, True}
    assert all((scale == 3.5).all() for _, scale in seen)
    seen.clear()
    Rehearsal(algorithm, 1)
    assert all(scale is None for _, scale in seen)
    free, embedded = rehearse(algorithm), rehearse(algorithm, EMBEDDED)
    assert embedded.training == free.training / (2 if isinstance(algorithm, FlowGRPO) else 1)


def test_reflexflow_measures_exposure_bias_on_the_velocity_that_it_trains(monkeypatch):
    """A network that takes a scale is called without one in collect as in the loss: both are the block's own."""
    seen, own = [], StandIn.velocity

    def velocity(self, latents, sigma, condition):
        seen.append("guidance" in condition)
        return own(self, latents, sigma, condition)

    monkeypatch.setattr(StandIn, "velocity", velocity)
    Rehearsal(ReflexFlow(), 1, EMBEDDED)
    assert seen
    assert not any(seen)
