"""Images in bf16 are drawn with bf16 weights: no float32 copy is held, and small adapters are not rounded away."""

import pytest
import torch
from pipelines import pipeline_folder
from runs import EVALUATION, HEAD, TRAIN, recipe, run_quietly, stage
from torch import nn

from posttrain.flow.sampling_settings import Sampling
from posttrain.planning.counts import Counts
from posttrain.planning.needs import evaluation_needs
from posttrain.sampling.sampler import _lower
from posttrain.stages.artifact import open_sampler

CPU, PROMPTS = torch.device("cpu"), ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA on a fully trained stage."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    train = TRAIN.replace("steps: 6", "steps: 2").replace("1e-3", "1e-2")
    lora = stage("lora", train=train, tune="{type: lora, rank: 2, before: stack}")
    run_quietly(recipe(stage("full", train=train), lora, head=HEAD), folder)
    return folder


def opened(source, precision):
    settings = Sampling(resolution=16, steps=3, guidance=2.0, precision=precision)
    sampler, _ = open_sampler(str(source), CPU, settings)
    return sampler.policy, sampler.images(PROMPTS, [0, 0], settings)


@pytest.mark.parametrize("name", ["full", "lora", "base"])
def test_the_weights_are_bf16_and_the_images_near_those_of_float32(trained, name):
    source = pipeline_folder() if name == "base" else trained / name
    policy, images = opened(source, "bf16")
    assert policy.autocast is None
    assert {p.dtype for p in policy.model.transformer.parameters()} == {torch.bfloat16}
    adapters = any(".lora_B." in n for n, _ in policy.model.transformer.named_parameters())
    assert adapters == (name == "lora")
    exact, wanted = opened(source, "fp32")
    assert {p.dtype for p in exact.model.transformer.parameters()} == {torch.float32}
    assert 0 < (images - wanted).abs().mean() < 0.03
    if name != "base":
        plain = opened(pipeline_folder(), "fp32")[1]
        assert (images - wanted).abs().mean() < 0.5 * (plain - wanted).abs().mean()


def test_what_diffusers_keeps_in_float32_stays():
    network = nn.ModuleDict(
        {"norm_out": nn.Linear(2, 2), "block": nn.ModuleDict({"norm_out": nn.Linear(2, 2)})}
    )
    network["proj"] = nn.Linear(2, 2)
    network.register_buffer("index", torch.arange(3))
    network._keep_in_fp32_modules = ["norm_out"]
    _lower(network, torch.bfloat16)
    kinds = {n: tensor.dtype for n, tensor in network.state_dict().items()}
    assert {n for n, dtype in kinds.items() if dtype == torch.float32} == {
        n for n in kinds if "norm_out" in n
    }
    assert kinds["proj.weight"] == torch.bfloat16
    assert kinds["index"] == torch.int64


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_printed_of_it(precision, capfd):
    opened(pipeline_folder(), precision)
    assert capfd.readouterr() == ("", "")


def test_a_plan_counts_the_weights_of_an_evaluation_in_its_precision():
    needed = []
    for precision in ("fp32", "bf16"):
        made = recipe(stage("sft"), evaluation=EVALUATION, overrides=[f"evaluation.precision={precision}"])
        counts = Counts(made.model, cuda=False)
        weights = counts.shape().transformer.frozen
        needed.append(evaluation_needs(made, made.evaluation, counts).memory)
    assert needed[0].weights - needed[1].weights == weights / 2
    assert needed[1].total < needed[0].total
