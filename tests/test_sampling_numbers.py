"""What is drawn for a prompt: rows, noise, grid, guidance and solver, on a linear velocity."""

import hashlib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from by_hand import SHAPE, Linear, conditions, linear_policy, near, velocity
from torch import nn

from posttrain.errors import ModelError, TrainingError
from posttrain.policy import Policy
from posttrain.policy import out_of_memory as memory
from posttrain.sampling.latents import prompt_noise, sample_images, sample_latents
from posttrain.sampling.prompts import encode
from posttrain.sampling.sampler import FlowSampler, flow_sampler, loaded_to_draw, sampler_of
from posttrain.support.randomness import generator
from posttrain.weights.files import hash_of


class Encoding(Linear):
    """Encodes prompts by their length; its grid and decoding say what they were asked."""

    def __init__(self, w=0.5):
        super().__init__(w)
        self.encoded, self.grids = [], []

    def encode_prompts(self, prompts):
        self.encoded.append(list(prompts))
        return {"c": torch.tensor([[len(p) / 10] for p in prompts])}

    def sigmas(self, steps, height, width):
        self.grids.append((steps, height, width))
        return torch.linspace(1, 0.25, steps + 1).tolist()

    def decode(self, latents):
        return latents * 2


def test_each_distinct_prompt_is_encoded_once_after_the_empty_one():
    model = Encoding()
    found, rows = encode(model, ["bb", "a", "bb", "cccc"])
    assert model.encoded == [["", "bb", "a", "cccc"]]
    assert rows.tolist() == [1, 2, 1, 3]
    near(found.table["c"].flatten(), [0, 0.2, 0.1, 0.4])
    model.prompt_cache = SimpleNamespace(conditions=lambda prompts: {"c": torch.ones(len(prompts), 1)})
    found, rows = encode(model, ["bb", "a"])
    assert len(model.encoded) == 1
    assert found.table["c"].tolist() == [[1.0]] * 3


def test_noise_belongs_to_seed_prompt_and_index():
    found = prompt_noise(3, "a fox", 2, [1, 2, 3])
    assert torch.equal(found, torch.randn(1, 2, 3, generator=generator(3, "evaluation", "a fox", 2)))
    for other in ((4, "a fox", 2), (3, "a dog", 2), (3, "a fox", 1)):
        assert not torch.equal(found, prompt_noise(*other, [1, 2, 3]))


def solved(x, sigmas, prompt, guidance, w=0.5):
    x = x.double()
    for s, t in pairwise(sigmas):
        x = x + (t - s) * velocity(w, x, torch.full((len(x),), s), prompt, guidance)
    return x


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_latents_are_sampled_by_the_role_in_use_without_gradients(guidance):
    policy, noise = linear_policy(0.5, old=-0.3), torch.linspace(-1, 1, 6).view(3, *SHAPE)
    prompt, sigmas = torch.tensor([3, 1, 2]), [1.0, 0.6, 0.1]
    args = (policy, conditions(), prompt, noise, sigmas, guidance)
    found = sample_latents(*args, "euler")
    assert not found.requires_grad
    near(found, solved(noise, sigmas, prompt, guidance))
    with policy.using("old"):
        near(sample_latents(*args, "euler"), solved(noise, sigmas, prompt, guidance, -0.3))
    assert policy.forward_equivalents == 2 * 3 * 2 * (1 if guidance == 1 else 2)


def test_the_solver_is_the_one_named():
    noise, sigmas = torch.linspace(-1, 1, 6).view(3, *SHAPE), [1.0, 0.8, 0.5, 0.3]
    args = (linear_policy(), conditions(), torch.tensor([1, 2, 3]), noise, sigmas, 1.0)
    assert (sample_latents(*args, "dpm2") - sample_latents(*args, "euler")).abs().max() > 1e-4


def test_low_precision_copies_are_kept_from_step_to_step(monkeypatch):
    entered, plain = [], Policy.casts_kept
    monkeypatch.setattr(Policy, "casts_kept", lambda self: entered.append(self) or plain(self))
    policy = linear_policy()
    sample_latents(policy, conditions(), torch.tensor([1]), torch.zeros(1, *SHAPE), [1.0, 0.0], 1.0, "euler")
    assert entered == [policy]


PROMPTS = ["aa", "bbb", "aa"]


def images(policy, **settings):
    return sample_images(policy, PROMPTS, [0, 0, 4], resolution=32, steps=3, **settings)


def expected(guidance, seed):
    sigmas, rows = [1.0, 0.75, 0.5, 0.25], torch.tensor([0.2, 0.3, 0.2])
    noise = torch.stack([prompt_noise(seed, p, i, SHAPE) for p, i in zip(PROMPTS, [0, 0, 4], strict=True)])
    x = noise.double()
    for s, t in pairwise(sigmas):
        v = 0.5 * x + s + guidance * rows.double().view(-1, 1, 1, 1)  # the empty prompt's condition is 0
        x = x + (t - s) * v
    return 2 * x


def test_images_of_prompts():
    model = Encoding()
    policy = Policy(model)
    near(images(policy, guidance=1.0), expected(1.0, 0))
    assert model.grids == [(3, 32, 32)]
    near(images(policy, guidance=3.0, seed=5), expected(3.0, 5))
    assert (images(policy, guidance=1.0, solver="dpm2") - images(policy, guidance=1.0)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="zip"):
        sample_images(policy, PROMPTS, [0], resolution=32, steps=3, guidance=1.0)


def test_images_are_drawn_in_smaller_chunks_where_memory_does_not_suffice(monkeypatch):
    class Small(Encoding):
        def velocity(self, latents, sigma, condition):
            if len(latents) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().velocity(latents, sigma, condition)

    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    policy = Policy(Small(), micro_batch=4)
    policy.model.room = 1
    near(images(policy, guidance=1.0), expected(1.0, 0))
    assert policy.micro_batch == 1
    policy.model.room = 0
    with pytest.raises(TrainingError):
        images(policy, guidance=1.0)
    # weights in parts cannot go on in the middle
    policy, policy.layout = Policy(Small(), micro_batch=4), SimpleNamespace(sharded=True, local=lambda p: p)
    policy.model.room = 1
    with pytest.raises(memory.OutOfMemory):
        images(policy, guidance=1.0)


def settings(**changed):
    values = {
        "resolution": 32,
        "steps": 3,
        "guidance": 3.0,
        "solver": "euler",
        "seed": 5,
        "precision": "fp32",
    }
    return SimpleNamespace(**{**values, **changed})


def test_a_sampler_follows_its_settings_and_counts_its_own_cost():
    policy = Policy(Encoding())
    policy.forward_equivalents = 100
    sampler = FlowSampler(policy, "here", {"a": 1})
    assert (sampler.source, sampler.settings, sampler.device, sampler.divisor) == (
        "here",
        {"a": 1},
        policy.model.device,
        1,
    )
    assert (FlowSampler(policy).source, FlowSampler(policy).settings) == ("", {})
    assert sampler.forward_equivalents == 0
    near(sampler.images(PROMPTS, [0, 0, 4], settings()), expected(3.0, 5))
    assert (sampler.forward_equivalents, policy.forward_equivalents) == (3 * 2 * 3, 100)
    near(sampler.images(PROMPTS, [0, 0, 4], settings(guidance=1.0, seed=0)), expected(1.0, 0))
    assert (sampler.forward_equivalents, policy.forward_equivalents) == (3 * 2 * 3 + 3 * 3, 100)
    other = sampler.images(PROMPTS, [0, 0, 4], settings(solver="dpm2"))
    assert (other - expected(3.0, 5)).abs().max() > 1e-4
    sampler.images(PROMPTS, [0, 0, 4], settings(steps=7, resolution=64))
    assert policy.model.grids[-1] == (7, 64, 64)
    assert sampler.fingerprint() == hash_of({"w": torch.tensor(0.5)})


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_models_sampler_has_weights_of_the_precision_asked_for(precision, dtype):
    model = Encoding()
    spec = SimpleNamespace(card_settings=lambda: {"type": "linear"})
    sampler = flow_sampler(model, spec, settings(precision=precision), "here")
    assert sampler.policy.model is model
    assert sampler.policy.autocast is None
    assert (sampler.source, sampler.settings) == ("here", {"type": "linear"})
    assert model.transformer.w.dtype == dtype


def test_only_numbers_that_are_not_kept_in_float32_are_lowered():
    model = Encoding()
    network = model.transformer
    network._keep_in_fp32_modules = ["norm"]
    network.norm = nn.LayerNorm(2)
    network.register_buffer("table", torch.ones(2))
    network.register_buffer("places", torch.arange(2))
    spec = SimpleNamespace(card_settings=dict)
    flow_sampler(model, spec, settings(precision="bf16"), "here")
    assert {name: tensor.dtype for name, tensor in network.state_dict().items()} == {
        "w": torch.bfloat16,
        "norm.weight": torch.float32,
        "norm.bias": torch.float32,
        "table": torch.bfloat16,
        "places": torch.int64,
    }


@pytest.mark.parametrize(("precision", "merge"), [("fp32", True), ("bf16", False)])
def test_weights_are_loaded_in_order_and_merged_in_float32_alone(precision, merge):
    block, loads = Block(), []
    block.weights_loaded = lambda source, merge: loads.append((source, merge))
    model = loaded_to_draw(block, torch.device("cpu"), settings(precision=precision), [Path("a"), Path("b")])
    assert model is block.loaded
    assert loads == [(Path("a"), merge), (Path("b"), merge)]


class Block:
    """A model block that records how it is asked for a sampler and for the weights."""

    type = "linear"
    problem = weights_loaded = None

    def unfit(self):
        return self.problem

    def __init__(self, own=None, **fields):
        self.own, self.fields, self.asked = own, fields, []

    def sampler(self, device, settings):
        self.asked.append(("sampler", device, settings))
        return self.own

    def load(self, device, transformer_dtype):
        self.asked.append(("load", device, transformer_dtype))
        self.loaded = Encoding()
        self.loaded.load_weights = self.weights_loaded
        return self.loaded

    def model_dump(self, mode="python"):
        return {name: str(value) if mode == "json" else value for name, value in self.fields.items()}

    def card_settings(self):
        return {"type": self.type}


def test_a_model_with_its_own_sampler_is_not_loaded():
    own, cpu, asked = object(), torch.device("cpu"), settings()
    spec = Block(own)
    assert sampler_of(spec, cpu, asked) is own
    assert spec.asked == [("sampler", cpu, asked)]


@pytest.mark.parametrize(
    ("fields", "source"), [({"path": Path("weights/here")}, "weights/here"), ({}, "linear")]
)
def test_a_model_without_its_own_sampler_is_loaded_as_asked_and_named_by_its_path_or_else_its_type(
    fields, source
):
    cpu, asked = torch.device("cpu"), settings(precision="bf16")
    spec = Block(**fields)
    sampler = sampler_of(spec, cpu, asked)
    assert spec.asked == [("sampler", cpu, asked), ("load", cpu, "bf16")]
    assert sampler.policy.model is spec.loaded
    assert sampler.source == source
    assert isinstance(sampler.source, str)
    assert sampler.settings == {"type": "linear"}


def test_the_hash_is_over_names_shapes_and_float32_values_in_the_order_of_names():
    a, b = torch.tensor([[1.0, -2.0]], dtype=torch.float64), nn.Parameter(torch.tensor([0.5]))
    digest = hashlib.sha256(b"a (1, 2)\n\x00\x00\x80?\x00\x00\x00\xc0b (1,)\n\x00\x00\x00?").hexdigest()
    assert hash_of({"b": b, "a": a}) == hash_of({"a": a, "b": b}) == digest
    assert hash_of({"a": a.T, "b": b}) != digest


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded():
    block = Block()
    block.problem = "the transformer has too few layers"
    with pytest.raises(ModelError, match=r"^the transformer has too few layers$"):
        sampler_of(block, torch.device("cpu"), settings())
    assert [what for what, *_ in block.asked] == ["sampler"], "not loaded"


class Named:
    """A model block that notes what it is asked for; with ``own`` it samples by itself."""

    type = "linear"

    def unfit(self):
        return None

    def __init__(self, own=None, **fields):
        self.own, self.fields, self.asked = own, fields, []

    def sampler(self, device, settings):
        self.asked.append((device, settings))
        return self.own

    def load(self, device, transformer_dtype):
        self.asked.append((device, transformer_dtype))
        return Encoding()

    def model_dump(self, mode="python"):
        return {name: value if mode == "json" else Path(value) for name, value in self.fields.items()}

    def card_settings(self):
        return {"type": "linear"}


def test_the_sampler_of_a_block_is_its_own_or_that_of_the_loaded_model():
    device, wanted, own = torch.device("cpu"), settings(precision="bf16"), object()
    spec = Named(own, path="here")
    assert sampler_of(spec, device, wanted) is own
    assert spec.asked == [(device, wanted)]
    spec = Named(path="here")
    sampler = sampler_of(spec, device, wanted)
    assert spec.asked == [(device, wanted), (device, "bf16")]
    assert (sampler.source, sampler.settings) == ("here", {"type": "linear"})
    assert isinstance(sampler.policy.model, Encoding)
    assert sampler_of(Named(), device, wanted).source == "linear"
