"""Every model family draws what diffusers' own pipeline draws, and trains at the sampler's noise levels."""

import pytest
import torch
from families import FAMILIES
from pipelines import assert_equal_but_for_rounding

from posttrain.algorithm import Batch, Tools
from posttrain.algorithms.sft import SFT
from posttrain.condition import Conditions
from posttrain.planning.counts import Counts
from posttrain.policy import Policy
from posttrain.policy.tuning import Lora
from posttrain.sampling.latents import prompt_noise, sample_latents
from posttrain.sampling.prompts import encode
from posttrain.stages.model_choice import model_of
from posttrain.support.randomness import Draws
from posttrain.testing import ModelLaws

PROMPTS = ["a photo of a red circle", "a blue square"]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


class TestLaws(ModelLaws):
    @pytest.fixture(autouse=True)
    def each(self, family):
        self.model, self.sizes, self.terminal = family.block(), family.sizes, family.terminal
        self.lora = Lora(rank=2, **family.lora)


def noise_for(model, size):
    shape = model.latent_shape(*size)
    return torch.stack([prompt_noise(0, p, 0, shape) for p in PROMPTS])


def test_the_class_of_its_pipeline_names_the_family(family):
    assert model_of(str(family.path)).type == family.type


def test_euler_samples_equal_those_of_diffusers(family):
    model = family.load()
    conditions, rows = encode(model, PROMPTS)
    for size in family.sizes:
        noise = noise_for(model, size)
        for guidance in family.guidance:
            expected = family.draw(model.pipeline, PROMPTS, noise, 6, guidance, size, model=model)
            sigmas = model.sigmas(6, *size)
            latents = sample_latents(Policy(model), conditions, rows, noise, sigmas, guidance, "euler")
            assert_equal_but_for_rounding(model.decode(latents), expected)
            assert expected.std() > 0.01, "an image of one colour shows nothing"


def test_guidance_and_prompts_change_the_velocity(family):
    model = family.load()
    policy, noise = Policy(model), noise_for(model, family.sizes[0])
    conditions, rows = encode(model, PROMPTS)
    sigma = torch.tensor([0.4, 0.8])
    with torch.no_grad():
        found = [policy.guided_velocity(noise, sigma, rows, conditions, g) for g in family.guidance]
        other = policy.guided_velocity(noise, sigma, rows.flip(0), conditions, family.guidance[0])
    assert (found[0] - other).abs().max() > 1e-4
    assert len(found) == 1 or (found[0] - found[1]).abs().max() > 1e-4


def test_sft_trains_at_the_models_sigma_for_the_size_of_each_image(family):
    model = family.load()
    for size in family.sizes:
        shape = model.latent_shape(*size)
        conditions = Conditions(model.encode_prompts(["", "a red circle"]))
        batch = Batch(torch.randn(4, *shape), torch.ones(4, dtype=torch.int64), conditions)
        draws = Draws((0, 0, 0), range(4))
        tools, sft = Tools(Policy(model), draws), SFT()
        times = sft.density(tools)
        items = sft.collect(batch, tools)
        torch.testing.assert_close(items.sigma, model.sigma(times, shape[1:]), rtol=0, atol=0)


def test_latents_of_an_image_are_what_the_decoder_takes(family):
    model = family.load()
    for size in family.sizes:
        pixels = torch.rand(2, 3, *size) * 2 - 1
        mean, logvar = model.posterior(pixels)
        latents = model.latents(mean, logvar, torch.zeros_like(mean))
        assert latents.shape[1:] == model.latent_shape(*size)
        torch.testing.assert_close(model.unscaled(latents), mean, rtol=1e-4, atol=1e-5)


def test_a_plan_counts_it_from_the_configurations_of_its_folder(family):
    model, counts = family.load(), Counts(family.block(), cuda=True)
    size, tune = family.sizes[0], Lora(rank=2, **family.lora)
    assert counts.latent_shape(size) == model.latent_shape(*size)
    encoded = model.encode_prompts(PROMPTS)
    assert {n: t.shape for n, t in counts.condition(2).items()} == {n: t.shape for n, t in encoded.items()}
    memory = counts.memory("training", size, tune)
    assert memory.peak(8) > memory.peak(4) > memory.peak(1) > 0
    larger = tuple(4 * side for side in size)  # some families fill up to a number of tokens
    assert counts.flops("forward", larger) > counts.flops("forward", size) > 0
    assert all(counts.flops(work, size) > 0 for work in ("encode", "decode", "text"))
    assert family.block().unfit() is None
