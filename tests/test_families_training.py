"""Every model family is trained, cached, resumed and exported by the same code, and loads in plain diffusers."""

import pytest
import torch
from families import FAMILIES
from runs import DATA, recipe, run_quietly, stage
from safetensors.torch import load_file

from posttrain.algorithm import Algorithm
from posttrain.engine.checkpoint_folder import saved
from posttrain.policy import Policy
from posttrain.registry import discover
from posttrain.sampling.latents import prompt_noise, sample_latents
from posttrain.sampling.prompts import encode
from posttrain.stages.artifact import open_artifact
from posttrain.weights.transformer import LORA

PROMPTS = ["a photo of a red circle", "a blue square"]
TRAIN = "{steps: 4, batch_size: 4, micro_batch: 4, learning_rate: 1e-2, checkpoint_every: 2, log_every: 1, ema: 0.9, sample_every: null}"
ALGORITHMS = sorted(discover(Algorithm, "posttrain.algorithms"))
SMALL = {
    "awm": "group_size: 2, num_steps: 3, train_timesteps: 2",
    "diffusion_nft": "group_size: 2, num_steps: 3",
    "dpo_online": "group_size: 2, num_steps: 3, points_per_pair: 2",
    "flow_grpo": "group_size: 2, num_steps: 3",
    "soar": "trajectory_length: 2",
}
"""What makes a stage of an algorithm short."""


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def head(family):
    fields = ", ".join(f"{k}: {v}" for k, v in family.settings.items())
    block = f"{{type: {family.type}, path: {family.path}{', ' if fields else ''}{fields}}}"
    return f"name: small\ntracker: none\ndevice: cpu\nmodel: {block}\n"


def lora(family):
    fields = "".join(f", {k}: {v}" for k, v in family.lora.items())
    return f"{{type: lora, rank: 2{fields}}}"


def made(family, algorithm="sft", tune="{type: full}", overrides=()):
    text = stage("s", f"{{type: {algorithm}, {SMALL.get(algorithm, '')}}}", TRAIN, tune=tune)
    if Algorithm.variants[algorithm].needs == "pairs":
        text = text.replace(DATA, "{type: shapes_pairs, pairs: 6}")
    if Algorithm.variants[algorithm].uses_rewards:
        side = family.sizes[0][1]
        text = text.replace(DATA, f"{{prompts: {{type: shapes, count: 6}}, resolution: {side}}}")
        text += "    rewards: jpeg_compressibility\n"
    return recipe(text, head=head(family), overrides=overrides)


def weights(folder):
    return load_file(folder / "s" / "final" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_caches_change_nothing_and_a_run_goes_on_to_the_bit(family, tmp_path):
    run_quietly(made(family), tmp_path / "plain")
    trained, before = weights(tmp_path / "plain"), dict(family.load().transformer.state_dict())
    assert any((trained[n] - before[n]).abs().max() > 1e-4 for n in trained)
    cached = ["cache={prompts: true, latents: mean_logvar}"]
    run_quietly(made(family, overrides=cached), tmp_path / "cached")
    assert_same(weights(tmp_path / "cached"), trained)
    run_quietly(made(family, overrides=["stages.0.train.steps=2"]), tmp_path / "resumed")
    run_quietly(made(family), tmp_path / "resumed")
    assert_same(weights(tmp_path / "resumed"), trained)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_lora_learns_by_every_algorithm(family, algorithm, tmp_path):
    run_quietly(made(family, algorithm, lora(family), ["stages.0.train.steps=2"]), tmp_path)
    tensors = load_file(tmp_path / "s" / "final" / LORA)
    moved = [t for name, t in tensors.items() if "lora_B" in name]
    assert moved
    assert sum(t.abs().max() > 1e-4 for t in moved) > len(moved) / 2
    assert saved(tmp_path / "s" / "checkpoints")


def test_what_a_stage_wrote_draws_in_plain_diffusers(family, tmp_path):
    from diffusers import DiffusionPipeline

    size, guidance = family.sizes[0], family.guidance[-1]
    base = family.load()
    noise = torch.stack([prompt_noise(0, p, 0, base.latent_shape(*size)) for p in PROMPTS])
    plain = family.draw(base.pipeline, PROMPTS, noise, 3, guidance, size, model=base)
    for name, tune in (("full", "{type: full}"), ("lora", lora(family))):
        run_quietly(made(family, tune=tune, overrides=["stages.0.train.ema=null"]), tmp_path / name)
        model = open_artifact(str(tmp_path / name / "s"), torch.device("cpu"))[0]
        conditions, rows = encode(model, PROMPTS)
        arguments = (conditions, rows, noise, model.sigmas(3, *size), guidance, "euler")
        own = model.decode(sample_latents(Policy(model), *arguments))
        final = tmp_path / name / "s" / "final"
        written = family.path if name == "lora" else final
        pipeline = DiffusionPipeline.from_pretrained(written, **family.parts(written))
        if name == "lora":
            pipeline.load_lora_weights(str(final))
        found = family.draw(pipeline, PROMPTS, noise, 3, guidance, size, model=model)
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
        assert (found - plain).abs().max() > 1e-3


@pytest.mark.matrix
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("cached", [False, True])
def test_every_algorithm_goes_on_to_the_bit(family, algorithm, tune, cached, tmp_path):
    block = "{type: full}" if tune == "full" else lora(family)
    latents = "off" if Algorithm.variants[algorithm].uses_rewards else "mean_logvar"
    cache = [f"cache={{prompts: true, latents: {latents}}}"] if cached else []
    run_quietly(made(family, algorithm, block, cache), tmp_path / "whole")
    run_quietly(made(family, algorithm, block, [*cache, "stages.0.train.steps=2"]), tmp_path / "halves")
    run_quietly(made(family, algorithm, block, cache), tmp_path / "halves")
    files = [next((tmp_path / f / "s" / "final").rglob("*.safetensors")) for f in ("whole", "halves")]
    if tune == "full":
        assert_same(*(weights(tmp_path / f) for f in ("whole", "halves")))
    else:
        assert_same(*(load_file(f) for f in files))
