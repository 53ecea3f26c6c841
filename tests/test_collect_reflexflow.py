"""What ReflexFlow trains on and with which loss, worked out by hand and where the answer is known."""

import math
from itertools import product

import pytest
import torch
from by_hand import SHAPE, Given, Linear, conditions, linear_policy, near, per_item, velocity, wide
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

from posttrain.algorithm import Batch, Items, Tools
from posttrain.algorithms.reflexflow import ReflexFlow, compensation, turned
from posttrain.algorithms.sft import SFT
from posttrain.engine.rehearsal import rehearse
from posttrain.policy import Policy

N = 4
T, U = torch.tensor([1.0, 0.5, 0.02, 0.3]), torch.tensor([0.5, 0.0, 0.9, 0.25])
PROMPT = torch.tensor([1, 2, 3, 1])
OFF = {"adr_weight": 0.0, "fc_alpha": 0.0}


def batch():
    latents = torch.arange(2.0 * N).view(N, *SHAPE) / 4 - 1
    return Batch(latents, PROMPT, conditions(), sample_index=torch.tensor([7, 3, 9, 5]))


def collected(algorithm, policy=None, **values):
    policy = policy or linear_policy(0.5)
    draws = Given(("a stage",), range(10, 10 + N), values={"timestep": T, "step": U, **values})
    with torch.no_grad():
        return algorithm.collect(batch(), Tools(policy, draws)), draws.normal("noise", SHAPE).double(), policy


def uniform_times(**settings):
    return ReflexFlow(weighting_scheme="none", **settings)


def shifted(t):
    return 3 * t.double() / (1 + 2 * t.double())


def step_by_hand(noise, prompt, step_range):
    """sigma before and after the step, and the clean and biased latents after it, in float64."""
    before, after, x0 = shifted(T), shifted(T.double() * (1 - step_range * U)), batch().latents.double()
    start, clean = ((1 - wide(s)) * x0 + wide(s) * noise for s in (before, after))
    return before, after, start, clean, start + wide(after - before) * velocity(0.5, start, before, prompt)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
@pytest.mark.parametrize("step_range", [1.0, 0.4])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("micro_batch", [1, 64])
def test_a_sample_has_its_clean_latents_and_where_a_step_of_the_model_leads(
    dropout, step_range, alpha, micro_batch
):
    algorithm = uniform_times(fc_alpha=alpha, step_range=step_range, cond_dropout=dropout)
    items, noise, policy = collected(algorithm, linear_policy(0.5, micro_batch))
    prompt = torch.zeros(N, dtype=torch.int64) if dropout else PROMPT
    before, after, start, clean, biased = step_by_hand(noise, prompt, step_range)
    near(items.latents, start)
    near(items.sigma, before)
    near(items.target, noise - batch().latents)
    near(items.biased_latents, biased)
    near(items.biased_sigma, after)
    near(items.drift, biased - batch().latents)
    bias = 0.5 * (clean - biased)  # sigma and condition are the same
    near(items.exposure_bias, per_item(bias**2))
    total = bias.abs().flatten(1).sum(1)
    assert total[1] == 0  # its step has no length, so nothing is weighted
    near(items.error_weight, 1 + alpha * bias / wide(total.clamp(min=1e-9)), atol=1e-4)
    assert items.error_weight[1].tolist() == torch.ones(SHAPE).tolist()
    assert items.weight.tolist() == [1.0] * N
    assert items.prompt_index.tolist() == prompt.tolist()
    assert items.sample_index.tolist() == [7, 3, 9, 5]
    assert policy.forward_equivalents == 3 * N
    assert policy.largest_forward == min(micro_batch, N)


def hand_made(**fields):
    made = {
        "latents": [[1.0, 2.0], [0.0, -4.0]], "target": [[2.0, 3.0], [0.0, 0.0]], "sigma": [0.5, 0.25],
        "biased_latents": [[0.5, 1.0], [2.0, -1.0]], "biased_sigma": [0.25, 0.125], "drift": [[1.0, 0.5], [0.0, -3.0]],
        "error_weight": [[0.5, 1.5], [1.75, 0.25]], "exposure_bias": [0.5, 2.0],
    }  # fmt: skip
    made = {name: torch.tensor(values) for name, values in (made | fields).items()}
    made = {name: v.view(2, *SHAPE) if v.ndim == 2 else v for name, v in made.items()}
    index = {"prompt_index": torch.tensor([1, 0]), "sample_index": torch.arange(2)}
    return Items(torch.ones(2), made | index, conditions())


@pytest.mark.parametrize(
    ("scheme", "adr", "fc", "alpha"), product(["none", "sigma_sqrt"], [0.0, 2.5], [1.0, 0.7], [0.0, 1.0])
)
def test_the_loss_and_its_gradient(scheme, adr, fc, alpha):
    """The velocity is w x + sigma + c, so its derivative by w is x. The weights and the drift are given."""
    algorithm = ReflexFlow(weighting_scheme=scheme, adr_weight=adr, fc_weight=fc, fc_alpha=alpha)
    policy, items = linear_policy(0.5), hand_made()
    losses = algorithm.loss(items, policy)
    x, x_biased = items.latents.double(), items.biased_latents.double()
    v, v_biased = velocity(0.5, x, items.sigma, items.prompt_index), None
    weight = items.error_weight.double() if alpha else 1.0
    factor = items.sigma.double() ** -2 if scheme == "sigma_sqrt" else 1.0
    expected = fc * factor * per_item(weight * (v - items.target) ** 2)
    gradient = fc * factor * per_item(2 * weight * (v - items.target) * x)
    metrics = {"exposure_bias": items.exposure_bias} if alpha else {}
    if adr:
        v_biased = velocity(0.5, x_biased, items.biased_sigma, items.prompt_index).flatten(1)
        drift, x_biased = items.drift.double().flatten(1), x_biased.flatten(1)
        length, along = v_biased.norm(dim=1), drift / drift.norm(dim=1, keepdim=True)
        cosine = (v_biased * along).sum(1) / length
        angle = 2 * (1 - cosine)
        # d cosine = (along - cosine unit) . x / length
        change = ((along - (cosine / length)[:, None] * v_biased) * x_biased).sum(1) / length
        metrics |= {"matching_loss": expected / fc, "drift_loss": angle}
        expected, gradient = expected + adr * angle, gradient - adr * 2 * change
    near(losses.per_item, expected)
    assert sorted(losses.metrics) == sorted(metrics)
    for name, value in metrics.items():
        near(losses.metrics[name], value)
    losses.per_item.sum().backward()
    assert policy.model.transformer.w.grad.item() == pytest.approx(gradient.sum().item(), rel=1e-4)
    assert policy.forward_equivalents == 3 * 2 * (2 if adr else 1)


class PointMass(Linear):
    """v = w (x - x0) / sigma: for w = 1 the velocity of data that are the one image x0."""

    def velocity(self, latents, sigma, condition):
        return self.transformer.w * (latents - IMAGE) / sigma.view(-1, 1, 1, 1)


IMAGE = torch.tensor([0.25, -1.5]).view(1, *SHAPE)


def of_a_point_mass(w, algorithm):
    policy = Policy(PointMass(w))
    draws = Given(("a stage",), range(N), values={"timestep": torch.tensor([0.9, 0.5, 0.2, 0.3]), "step": U})
    given = Batch(IMAGE.expand(N, -1, -1, -1), PROMPT, conditions())
    with torch.no_grad():
        items = algorithm.collect(given, Tools(policy, draws))
    losses = algorithm.loss(items, policy)
    losses.per_item.sum().backward()
    return items, losses, policy.model.transformer.w.grad.item()


def test_an_exact_model_has_nothing_to_correct():
    items, losses, gradient = of_a_point_mass(1.0, uniform_times())
    clean = IMAGE + wide(items.biased_sigma).float() * (items.target)
    near(items.biased_latents, clean)
    near(losses.per_item, torch.zeros(N))
    assert gradient == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("w", [0.6, 1.7])
def test_a_model_that_is_too_slow_or_fast_has_the_bias_of_its_speed_and_no_drift(w):
    """Every step stays on the line to the image, so only lengths are wrong, which the drift does not see."""
    items, losses, gradient = of_a_point_mass(w, uniform_times(fc_alpha=0.8))
    near(losses.metrics["drift_loss"], torch.zeros(N))
    before, after = items.sigma.double(), items.biased_sigma.double()
    d = items.target.double()
    bias = wide(w * (w - 1) * (before - after) / after) * d
    near(items.exposure_bias, per_item(bias**2), rtol=1e-4)
    sign = torch.sign(before - after) * (1 if w > 1 else -1)
    weight = 1 + 0.8 * wide(sign) * d / wide(d.abs().flatten(1).sum(1))
    near(items.error_weight, weight, rtol=1e-4, atol=1e-4)
    near(losses.per_item, per_item(weight * ((w - 1) * d) ** 2), rtol=1e-4)
    assert gradient == pytest.approx(per_item(2 * weight * (w - 1) * d**2).sum().item(), rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_without_both_corrections_it_is_sft_to_the_bit(dropout):
    policy, sft_policy = linear_policy(0.5), linear_policy(0.5)
    algorithm, sft = ReflexFlow(**OFF, cond_dropout=dropout), SFT(cond_dropout=dropout)
    (items, _, _), (given, _, _) = collected(algorithm, policy), collected(sft, sft_policy)
    assert items.fields.keys() == given.fields.keys()
    assert all(torch.equal(items.fields[name], given.fields[name]) for name in given.fields)
    losses, expected = algorithm.loss(items, policy), sft.loss(given, sft_policy)
    assert torch.equal(losses.per_item, expected.per_item)
    assert losses.metrics == {}
    losses.per_item.sum().backward()
    expected.per_item.sum().backward()
    assert torch.equal(policy.model.transformer.w.grad, sft_policy.model.transformer.w.grad)


def test_a_correction_changes_nothing_else():
    both, adr, fc = (collected(ReflexFlow(**s))[0] for s in ({}, {"fc_alpha": 0.0}, {"adr_weight": 0.0}))
    base = {"latents", "sigma", "target", "prompt_index", "sample_index"}
    assert adr.fields.keys() == base | {"biased_latents", "biased_sigma", "drift"}
    assert fc.fields.keys() == base | {"error_weight", "exposure_bias"}
    assert both.fields.keys() == adr.fields.keys() | fc.fields.keys()
    assert all(torch.equal(both.fields[name], v) for part in (adr, fc) for name, v in part.fields.items())


@pytest.mark.parametrize(
    ("settings", "rollout", "training"),
    [({}, 3, 2), ({"fc_alpha": 0.0}, 1, 2), ({"adr_weight": 0.0}, 3, 1), (OFF, 0, 1)],
)
def test_the_cost(settings, rollout, training):
    calls = rehearse(ReflexFlow(**settings))
    assert (calls.items, calls.rollout, calls.training, calls.frozen) == (1, rollout, training, 0)
    assert (calls.rows_without, calls.rows_with) == (1, training)
    assert calls.forward_equivalents == rollout + 3 * training


def test_an_items_weight_is_its_images():
    rows = [{"prompt": "a", "weight": 2.5}, {"prompt": "b"}, {"prompt": "c", "weight": 0.5}, {"prompt": "d"}]
    given = Batch(batch().latents, PROMPT, conditions(), rows)
    draws = Given(("a stage",), range(N), values={})
    with torch.no_grad():
        items = ReflexFlow().collect(given, Tools(linear_policy(0.5), draws))
    assert items.weight.tolist() == [2.5, 1.0, 0.5, 1.0]


NUMBERS = st.floats(-1e6, 1e6, width=32).filter(lambda a: a == 0 or abs(a) > 1e-6)


@hypothesis_given(st.lists(NUMBERS, min_size=2, max_size=12), st.floats(0, 1))
def test_weights_sum_to_at_most_alpha_beside_their_number_and_follow_the_sign_of_the_bias(bias, alpha):
    tensor = torch.tensor([bias, [0.0] * len(bias)], dtype=torch.float64).view(2, 1, 1, -1)
    weight, none = compensation(tensor, alpha)
    assert none.flatten().tolist() == [1.0] * len(bias)
    moved = weight.flatten() - 1
    if any(bias):
        assert moved.abs().sum().item() == pytest.approx(alpha, abs=1e-9)
    assert bool((moved * tensor[0].flatten() >= 0).all())
    assert bool((weight >= 0).all())


def test_a_large_alpha_makes_no_weight_negative():
    weight = compensation(torch.tensor([[3.0, -1.0]]).view(1, *SHAPE), 8.0)
    near(weight.flatten(), [1 + 8 * 3 / 4, 0.0])


@pytest.mark.parametrize("degrees", [0, 30, 90, 180])
def test_the_drift_is_twice_one_minus_the_cosine_at_any_length(degrees):
    angle = math.radians(degrees)
    v = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64).view(1, *SHAPE)
    along = torch.tensor([[1.0, 0.0]], dtype=torch.float64).view(1, *SHAPE)
    for a, b in product((1e-3, 1.0, 50.0), repeat=2):
        near(turned(a * v, b * along), [2 * (1 - math.cos(angle))])
    near(turned(torch.zeros_like(v), along), [1.0])


def test_the_drifts_gradient_is_that_of_finite_differences_and_turns_only():
    generator = torch.Generator().manual_seed(0)
    v, drift = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, generator=generator)
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: turned(v, drift), (v,))
    (gradient,) = torch.autograd.grad(turned(v, drift).sum(), v)
    near((gradient * v).flatten(1).sum(1), torch.zeros(3), atol=1e-12)
