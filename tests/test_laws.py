"""posttrain.testing: who breaks a law is told which, and what to do."""

import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from faulty_kinds import OWN, Dots, Mine, Small, Taste

from posttrain.algorithm import Algorithm
from posttrain.algorithms.sft import SFT
from posttrain.policy.tuning import Lora
from posttrain.reward import Reward
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


def test_the_folder_of_data_does_not_exist_as_in_a_run(monkeypatch):
    found = []
    monkeypatch.setattr(Dots, "open", lambda self, opening: found.append(opening.folder.exists()))
    with DataTests().opened():
        pass
    assert found == [False]


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
        assert first == f"faulty_kinds:{name} (type {subject.type!r}) breaks a law: {words}."
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
    assert numbers.sub("N", str(told.value)) == numbers.sub(
        "N", shown.replace("mine:Mine", "faulty_kinds:Mine")
    )


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
