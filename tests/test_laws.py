"""posttrain.testing: our own rewards and data keep the laws, and who breaks one is told which, and what to do."""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from image_layouts import LAYOUTS
from pydantic import Field
from test_model_contract import Net, ToyFlow
from tiny_clip import tiny_clip

from posttrain.algorithm import Algorithm, Batch, Items, Losses
from posttrain.algorithms.sft import SFT
from posttrain.data.family import Data, Facts
from posttrain.data.image_data import ImageData, ShapesData
from posttrain.data.pair_data import PairData, ShapesPairData
from posttrain.data.prompt_data import PromptData
from posttrain.data.settings import ShapesPrompts
from posttrain.data.source import BatchSource
from posttrain.flow import interpolate
from posttrain.model import Model, torch_dtype
from posttrain.policy.tuning import Lora
from posttrain.registry import discover
from posttrain.reward import Reward, Scores
from posttrain.rewards.pickscore import PickScore
from posttrain.sampling.prompts import encode
from posttrain.support.randomness import Draws
from posttrain.testing import (
    AlgorithmLaws,
    BlockLaws,
    DataLaws,
    LawBroken,
    ModelLaws,
    RewardLaws,
    laws,
)
from posttrain.testing.toys import Thumbnails, toy_policy

REWARDS = discover(Reward, "posttrain.rewards")
REQUIRED = {
    "callable": {"function": "statistics:mean"},
    "remote": {"url": "http://127.0.0.1:1", "name": "x"},
    "unifiedreward": {"url": "http://127.0.0.1:1"},
}
"""Fields without a default."""


class TestEveryRewardsBlock(BlockLaws):
    @pytest.fixture(autouse=True, params=sorted(REWARDS))
    def each(self, request):
        self.block = self.reward = REWARDS[request.param](**REQUIRED.get(request.param, {}))

    test_it_says_its_range_and_what_it_needs = RewardLaws.test_it_says_its_range_and_what_it_needs


class TestEveryRewardWithoutWeights(RewardLaws):
    @pytest.fixture(
        autouse=True,
        params=sorted(n for n, kind in REWARDS.items() if not kind.weights and n not in REQUIRED),
    )
    def each(self, request):
        self.reward = REWARDS[request.param]()


class TestARewardWithANetwork(RewardLaws):
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return str(tiny_clip(tmp_path_factory.mktemp("clip")))

    @pytest.fixture(autouse=True)
    def each(self, folder):
        self.reward = PickScore(path=folder, processor=folder)


class TestEveryDataSource(DataLaws):
    @pytest.fixture(autouse=True, params=sorted(discover(Data, "posttrain.data")))
    def each(self, request, tmp_path):
        made = {
            "images": lambda: ImageData(images=LAYOUTS["captions"](tmp_path), resolution=32),
            "shapes": lambda: ShapesData(images=10),
            "pairs": lambda: PairData(pairs=self.pairs(tmp_path), resolution=64),
            "shapes_pairs": lambda: ShapesPairData(pairs=10),
            "prompts": lambda: PromptData(prompts=ShapesPrompts(count=10), resolution=64),
        }
        self.data = made[request.param]()
        self.samples_per_prompt = 2 if request.param == "prompts" else 1

    def pairs(self, folder):
        return (
            ShapesPairData(pairs=10)
            .build(folder)
            .pairs.rename(folder / "shapes-pairs-10-0" / "images" / "p.jsonl")
        )


class Mine(Algorithm):
    """Flow matching, in which one thing at a time can be wrong."""

    type: Literal["mine"] = "mine"
    needs: ClassVar = "images"
    fault: str = Field(default="", description="What is wrong.")

    def collect(self, batch, tools):
        draws, n = tools.draws, len(batch)
        noise = draws.normal("noise", batch.latents.shape[1:])
        sigma = torch.sigmoid(draws.normal("t", ()))
        if self.fault == "global noise":
            noise = torch.randn(batch.latents.shape)
        if self.fault == "batch noise":
            noise = noise - noise.mean(0)
        if self.fault == "same noise":
            sigma, noise = torch.full((n,), 0.5), torch.ones_like(batch.latents)
        if self.fault == "moves":
            next(iter(tools.policy.trained.values())).mul_(2)
        if self.fault == "rows":
            batch = batch.take(slice(0, n - 1))
            noise, sigma = noise[:-1], sigma[:-1]
        fields = {
            "latents": interpolate(batch.latents, noise, sigma),
            "sigma": sigma,
            "target": noise - batch.latents,
        }
        fields |= {"prompt_index": batch.prompt_index, "sample_index": batch.sample_index}
        if self.fault == "same noise":
            fields |= {"latents": torch.zeros_like(noise), "target": noise}
        if self.fault == "chunks":
            fields["target"] = fields["target"] * tools.policy.micro_batch
        weight = torch.ones_like(sigma)
        if self.fault == "random weight":
            weight = torch.tensor(np.random.default_rng().random(len(sigma)))
        if self.fault == "weight of chunks":
            weight = weight * tools.policy.micro_batch
        return Items(weight, fields, batch.conditions)

    def loss(self, items, policy):
        latents = items.latents
        if self.fault == "dropout":
            latents = torch.nn.functional.dropout(latents, 0.5)
        error = (
            (policy.velocity(latents, items.sigma, items.condition) - items.target)
            .square()
            .flatten(1)
            .mean(1)
        )
        if self.fault == "batch mean":
            error = error / error.mean().detach()
        if self.fault == "no gradient":
            error = (items.target * next(iter(policy.trained.values())).sum() * 0).flatten(1).mean(1)
        return Losses(error)


class Taste(Reward):
    """The mean red of an image, in which one thing at a time can be wrong."""

    type: Literal["taste"] = "taste"
    range: ClassVar = (0.0, 1.0)
    fault: str = Field(default="", description="What is wrong.")

    def about(self):
        return "" if self.fault == "wordless" else super().about()

    def load(self, device):
        def score(images, prompts, metadata):
            red = images[:, 0].flatten(1).mean(1)
            wrong = {
                "constant": lambda: torch.zeros(len(red)),
                "range": lambda: red * 10,
                "batch": lambda: red - red.mean() + 0.5,
                "random": lambda: torch.rand(len(red)),
                "division": lambda: red * (images.flatten(1).std(1) / images.flatten(1).std(1)),
            }
            details = {
                "random detail": {"red": torch.tensor(np.random.default_rng().random(len(red)))},
                "detail of a batch": {"red": red - red.mean()},
            }
            return Scores(wrong.get(self.fault, lambda: red)(), details.get(self.fault, {}))

        return score


class DotSource(BatchSource):
    """Constant latents, and a prompt for each."""

    def __init__(self, opening, fault):
        self.opening, self.fault, self.model = opening, fault, opening.model
        self.prompts = [f"a photo of {n} dots" for n in range(8)]
        self.size = self.largest = (16, 16)

    def batches(self, key, start):
        world, count = self.opening.world, self.opening.batch_size // self.opening.world.size
        for number in itertools.count(0 if self.fault == "restarts" else start):
            first = number * self.opening.batch_size + (0 if self.fault == "all" else world.rank * count)
            ids = [(first + i) % 8 for i in range(count)]
            more = (
                " or more" * int(np.random.default_rng().integers(1000)) if self.fault == "captions" else ""
            )
            conditions, rows = encode(self.model, [self.prompts[i] + more for i in ids])
            latents = torch.stack([torch.full(self.model.latent_shape(*self.size), i / 8) for i in ids])
            if self.fault == "random":
                latents = torch.randn(latents.shape)
            if self.fault == "infinite":
                latents[0] = float("nan")
            drawn = ids[1:] if self.fault == "short" else ids
            index = torch.arange(count) + world.rank * count
            batch = Batch(latents, rows, conditions, sample_index=index, total=self.opening.batch_size)
            yield number, batch, Draws((*key, number), drawn)


class Dots(Data):
    """Dots, in which one thing at a time can be wrong."""

    type: Literal["dotted"] = "dotted"
    gives: ClassVar = "images"
    fault: str = Field(default="", description="What is wrong.")

    def open(self, opening):
        return DotSource(opening, self.fault)

    def facts(self, path):
        return Facts((64, 64) if self.fault == "size" else (16, 16), 3 if self.fault == "prompts" else 8)

    def problems(self):
        if self.fault == "problem":
            yield "fault", "nothing is there"


class WrongFlow(ToyFlow):
    """The toy of test_model_contract.py, in which one thing at a time can be wrong."""

    fault = ""

    def encode_prompts(self, prompts):
        condition = super().encode_prompts(prompts)
        return {"c": condition["c"] - condition["c"].mean(0)} if self.fault == "centred" else condition

    def posterior(self, pixels):
        mean, logvar = super().posterior(pixels)
        return (mean - mean.mean(0) if self.fault == "encoding" else mean), logvar

    def latent_shape(self, height, width):
        return super().latent_shape(height, width)[:: -1 if self.fault == "shape" else 1]

    def decode(self, latents):
        return super().decode(latents) + (1 if self.fault == "range" else 0)

    def velocity(self, latents, sigma, condition):
        if self.fault == "sigma":
            sigma = torch.zeros_like(sigma)
        if self.fault == "neighbours":
            latents = latents + latents.mean(0)
        own = (
            self.transformer.dtype
            if self.fault == "own dtype"
            else self.forward_dtype or self.transformer.dtype
        )
        dtype = torch.float32 if self.fault == "dtype" else own
        inputs = latents.to(dtype), sigma.to(dtype), {k: v.to(dtype) for k, v in condition.items()}
        if self.fault == "transformer":
            self.module = self.transformer
        found = super().velocity(*inputs).float()
        return found.detach().requires_grad_() if self.fault == "detached" else found

    def sigmas(self, steps, height, width):
        grid = super().sigmas(steps, height, width)
        if self.fault == "static":
            grid = [3 * s / (1 + 2 * s) for s in grid]
        if self.fault in ("stretched", "static"):
            last = grid[-2]
            return [*(1 - 0.98 * (1 - s) / (1 - last) for s in grid[:-1]), 0.0]
        return [s**2 for s in grid] if self.fault == "grid" else grid

    def identity(self, encoder):
        return {1, 2} if self.fault == "identity" else super().identity(encoder)

    def load_weights(self, source, merge=True):
        if self.fault != "forgets":
            super().load_weights(source, merge)


class Small(Model):
    """A toy model."""

    type: Literal["small"] = "small"
    fault: str = Field(default="", description="What is wrong.")

    def load(self, device, transformer_dtype):
        torch.manual_seed(0)
        model = WrongFlow(Net().to(device, torch_dtype(transformer_dtype)), device)
        model.fault = self.fault
        return model


OWN = {"mine": Algorithm, "taste": Reward, "dotted": Data, "small": Model}
for name, kind in OWN.items():
    OWN[name] = kind, kind.variants.pop(name)  # or other tests would find it


class AlgorithmTests(AlgorithmLaws):
    algorithm = Mine()


class RewardTests(RewardLaws):
    reward = Taste()


class DataTests(DataLaws):
    data = Dots()


class ModelTests(ModelLaws):
    model = Small()
    lora = Lora(rank=2, targets=["first", "last"])


class StretchedTests(ModelTests):
    """Of a model whose sampling grid ends at 0.02; where it is ``static``, the grid is shifted, but not sigma(t)."""

    terminal = 0.02


FAULTS = [
    (AlgorithmTests, "", ""),
    (AlgorithmTests, "global noise", "all randomness of collect comes from tools.draws"),
    (AlgorithmTests, "batch noise", "a sample draws the same in any batch"),
    (AlgorithmTests, "same noise", "all randomness of collect comes from tools.draws"),
    (AlgorithmTests, "moves", "collect and loss move no weights"),
    (AlgorithmTests, "rows", "the cost and the number of items are what the plan counts"),
    (AlgorithmTests, "chunks", "collect does not depend on how many rows a forward takes"),
    (AlgorithmTests, "random weight", "all randomness of collect comes from tools.draws"),
    (AlgorithmTests, "weight of chunks", "collect does not depend on how many rows a forward takes"),
    (AlgorithmTests, "dropout", "loss draws no random number"),
    (AlgorithmTests, "batch mean", "the gradient does not depend on the micro-batch"),
    (AlgorithmTests, "no gradient", "the gradient does not depend on the micro-batch"),
    (RewardTests, "", ""),
    (RewardTests, "constant", "every image has a finite score in the range, and the scores differ"),
    (RewardTests, "range", "every image has a finite score in the range, and the scores differ"),
    (RewardTests, "batch", "a score depends on its own image, prompt and row alone"),
    (RewardTests, "random", "equal images have equal scores, by a reward that was loaded again too"),
    (RewardTests, "random detail", "equal images have equal scores, by a reward that was loaded again too"),
    (RewardTests, "detail of a batch", "a score depends on its own image, prompt and row alone"),
    (RewardTests, "division", "images without a detail have a score too"),
    (RewardTests, "wordless", "it says its range, and which packages and weights it needs"),
    (DataTests, "", ""),
    (DataTests, "problem", "data that can be opened have no problem, and say what they are in words"),
    (DataTests, "prompts", "prompts and sizes are what the plan was told"),
    (DataTests, "size", "prompts and sizes are what the plan was told"),
    (DataTests, "short", "a batch is whole: latents, prompts, rows and draws of as many samples, all finite"),
    (
        DataTests,
        "infinite",
        "a batch is whole: latents, prompts, rows and draws of as many samples, all finite",
    ),
    (
        DataTests,
        "random",
        "a batch is a function of its key and its number, so a run goes on where it was cut off",
    ),
    (
        DataTests,
        "captions",
        "a batch is a function of its key and its number, so a run goes on where it was cut off",
    ),
    (
        DataTests,
        "restarts",
        "a batch is a function of its key and its number, so a run goes on where it was cut off",
    ),
    (DataTests, "all", "two processes share each batch, in equal parts"),
    (ModelTests, "", ""),
    (ModelTests, "centred", "a prompt's condition is the same whatever is encoded with it"),
    (ModelTests, "encoding", "an image's encoding is the same whatever is encoded with it"),
    (
        ModelTests,
        "shape",
        "an image's latents have the shape that latent_shape says, and decode to images in [0, 1]",
    ),
    (
        ModelTests,
        "range",
        "an image's latents have the shape that latent_shape says, and decode to images in [0, 1]",
    ),
    (
        ModelTests,
        "dtype",
        "the velocity is float32, of the latents' shape, and finite from sigma 0 to 1, with bf16 weights too",
    ),
    *(
        (
            ModelTests,
            fault,
            "the velocity is float32, of the latents' shape, and finite from sigma 0 to 1, with bf16 weights too",
        )
        for fault in ("transformer", "own dtype")
    ),
    (
        ModelTests,
        "sigma",
        "a row's velocity depends on its own latents, sigma and prompt, and on nothing else",
    ),
    (
        ModelTests,
        "neighbours",
        "a row's velocity depends on its own latents, sigma and prompt, and on nothing else",
    ),
    (ModelTests, "grid", "training draws its sigmas by the function that makes the sampling grid"),
    (StretchedTests, "stretched", ""),
    (StretchedTests, "static", "training draws its sigmas by the function that makes the sampling grid"),
    (
        ModelTests,
        "detached",
        "the weights that velocity uses are those of self.transformer, and what is saved loads again",
    ),
    (
        ModelTests,
        "forgets",
        "the weights that velocity uses are those of self.transformer, and what is saved loads again",
    ),
    (ModelTests, "forgets", "a LoRA changes the velocity and loads again"),
    (
        ModelTests,
        "identity",
        "what its encodings depend on is plain, and its outline has the shapes of the loaded weights",
    ),
]


def broken(tests):
    """The messages of the laws that ``tests`` breaks."""
    for law in laws(type(tests)):
        try:
            getattr(tests, law.test)()
        except LawBroken as error:
            yield law.words, str(error)


@pytest.mark.parametrize(("kind", "fault", "words"), FAULTS)
def test_each_fault_breaks_its_law_and_is_told_in_words(kind, fault, words, monkeypatch):
    for name, (family, own) in OWN.items():
        monkeypatch.setitem(family.variants, name, own)
    tests = kind()
    subject = type(tests.subject())(fault=fault)
    setattr(tests, kind.about, subject)
    found = dict(broken(tests))
    assert bool(found) is bool(words), found
    if words:
        name = type(subject).__name__
        first, second, third = found[words].splitlines()
        assert first == f"test_laws:{name} (type {subject.type!r}) breaks a law: {words}."
        assert second.startswith("found: ")
        assert third.startswith("to do: ")
        assert len(second) > 15 < len(third)


def test_a_block_is_asked_for_its_type_its_words_and_its_state(monkeypatch):
    class Silent(Reward):
        type: Literal["silent"] = "silent"
        range: ClassVar = (0.0, 1.0)
        knob: int = 3

        def load(self, device): ...

    del Reward.variants["silent"]
    tests = type("Tests", (RewardLaws,), {"reward": Silent()})()
    found = dict(broken(tests))
    assert "type 'silent' is registered for None" in found["its type finds it"]
    assert "the class has no docstring" in found["it says what it is and what its fields mean"]
    assert "pickle" in found["it is the same after it was written to a recipe, and in another process"]
    Silent.__doc__ = "Something."
    found = dict(broken(tests))
    assert "no docstring below knob" in found["it says what it is and what its fields mean"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Tests does not say what it tests: write 'algorithm = Mine()' in the class Tests"),
        ({"algorithm": SFT}, "Tests.algorithm is the class SFT, not an object: write 'algorithm = Mine()'"),
        ({"algorithm": Taste()}, "Tests.algorithm is Taste, which is no posttrain.algorithm.Algorithm"),
    ],
)
def test_a_class_of_tests_that_names_no_object_is_told(given, words):
    tests = type("Tests", (AlgorithmLaws,), given)()
    for law in laws(AlgorithmLaws):
        with pytest.raises(LawBroken, match="^" + words.replace("(", r"\(").replace(")", r"\)")):
            getattr(tests, law.test)()


def test_the_message_on_the_page_is_what_is_said(monkeypatch):
    monkeypatch.setitem(Algorithm.variants, "mine", Mine)
    tests = AlgorithmTests()
    tests.algorithm = Mine(fault="dropout")
    with pytest.raises(LawBroken) as told:
        tests.test_loss_draws_no_random_number()
    page = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()
    (shown,) = re.findall(r"LawBroken: (mine:.*?)\n```", page, re.S)
    numbers = re.compile(r"[\d.]+$", re.M)
    assert numbers.sub("N", str(told.value)) == numbers.sub("N", shown.replace("mine:Mine", "test_laws:Mine"))


def test_a_law_that_is_set_to_none_is_left_out():
    left_out = type("Tests", (ModelLaws,), {"test_a_lora_loads_again": None})
    assert {law.test for law in laws(ModelLaws)} - {law.test for law in laws(left_out)} == {
        "test_a_lora_loads_again"
    }


def test_the_laws_need_no_pytest():
    code = "import sys; sys.modules['pytest'] = sys.modules['_pytest'] = None; import posttrain.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_each_law_has_words_of_its_own_and_can_be_broken():
    for kind in (AlgorithmLaws, RewardLaws, ModelLaws, DataLaws):
        found = list(laws(kind))
        assert len(found) >= 8
        assert len({law.words for law in found}) == len(found)
    of_one = {law.words for kind in (AlgorithmLaws, RewardLaws, ModelLaws, DataLaws) for law in laws(kind)}
    of_one -= {law.words for law in laws(BlockLaws)}
    assert of_one == {words for _, _, words in FAULTS if words}, "each law has a fault that breaks it"


def test_toys_leave_the_global_generator_alone():
    """A law compares the generator's state before and after; whichever law comes first builds the toy."""
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    Thumbnails()
    toy_policy()
    assert torch.equal(before, torch.get_rng_state())
