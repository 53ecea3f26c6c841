"""SANA reads its scheduler, its instruction and its autoencoder as diffusers' pipeline does."""

import inspect
import json
import shutil

import pytest
import torch
from families import CPU, FAMILIES
from pipelines import assert_equal_but_for_rounding
from runs import run_quietly
from safetensors.torch import load_file
from test_families_training import lora, made

from posttrain.errors import ModelError
from posttrain.flow.solvers import solve
from posttrain.models._licences import origin_of
from posttrain.models._published import PUBLISHED
from posttrain.models.sana import Sana
from posttrain.policy.tuning import Lora
from posttrain.stages.export import export, trained_at
from posttrain.weights.transformer import LORA

FAMILY = FAMILIES["sana"]
NAME = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"


def changed(folder, file, **fields):
    """A copy of the small pipeline in ``folder``, with fields of a configuration ``file`` changed."""
    shutil.copytree(FAMILY.path, folder, dirs_exist_ok=True)
    config = json.loads((folder / file).read_text("utf-8"))
    (folder / file).write_text(json.dumps({**config, **fields}), "utf-8")
    return Sana(path=str(folder), **FAMILY.settings)


@pytest.mark.parametrize(("solver", "order"), [("dpm1", 1), ("dpm2", 2)])
@pytest.mark.parametrize("steps", [4, 20])
def test_the_dpm_solvers_are_those_of_its_published_scheduler(solver, order, steps):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_config(
        {**FAMILY.load().scheduler.config, "solver_order": order}
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    velocity = lambda x, sigma: torch.sin(3 * x + sigma)  # noqa: E731
    noise = x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for sigma, time in zip(sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(x, sigma), time, x, return_dict=False)[0]
    assert_equal_but_for_rounding(solve(velocity, noise, sigmas, solver), x)
    assert (solve(velocity, noise, sigmas, "euler") - x).abs().max() > (1e-4 if order == 2 else 0)


def test_its_grid_is_the_published_schedulers_divided_by_0_999():
    model = FAMILY.load()
    model.scheduler.set_timesteps(5)
    size = model.latent_shape(32, 32)[1:]
    times = 0.999 * torch.linspace(1, 0, 6, dtype=torch.float64)
    torch.testing.assert_close(model.sigma(times, size), model.scheduler.sigmas.double())
    torch.testing.assert_close(
        torch.tensor(model.sigmas(5, 32, 32)), model.sigma(torch.linspace(1, 0, 6), size)
    )


def test_a_folder_with_an_euler_scheduler_has_that_schedulers_grid(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    block = changed(tmp_path, "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.save_pretrained(tmp_path / "scheduler")
    model = block.load(CPU, "fp32")
    scheduler.set_timesteps(5)
    assert model.sigmas(5, 32, 32) == scheduler.sigmas.tolist()
    assert model.sigma(torch.tensor(0.5), (8, 8)) == pytest.approx(2 / 3)


def test_by_default_the_instruction_is_the_pipelines_and_the_empty_prompt_has_none():
    model = FAMILY.load(complex_human_instruction=None)
    parameters = inspect.signature(type(model.pipeline).__call__).parameters
    prompts = ["a cat", "a much longer prompt, of which the end is cut off"]
    expected = model.pipeline.encode_prompt(
        prompts,
        device=CPU,
        max_sequence_length=24,
        complex_human_instruction=parameters["complex_human_instruction"].default,
    )
    found = model.encode_prompts([*prompts, ""])
    assert torch.equal(found["encoder_attention_mask"][:2], expected[1])
    assert torch.equal(found["encoder_attention_mask"][2], expected[3][0])
    assert_equal_but_for_rounding(found["encoder_hidden_states"][:2], expected[0])
    assert_equal_but_for_rounding(found["encoder_hidden_states"][2], expected[2][0])
    none = FAMILY.load(complex_human_instruction=[]).encode_prompts(prompts)
    assert (none["encoder_hidden_states"] - expected[0]).abs().max() > 1e-2
    assert none["encoder_attention_mask"].sum(1).tolist() == [6, 24]  # the beginning, and five characters


def test_padding_has_no_influence():
    model = FAMILY.load()
    condition = model.encode_prompts(["a cat"])
    padding = condition["encoder_attention_mask"] == 0
    assert padding.any()
    embeds = condition["encoder_hidden_states"]
    other = {**condition, "encoder_hidden_states": torch.where(padding[..., None], embeds + 1, embeds)}
    arguments = torch.randn(1, *model.latent_shape(32, 32)), torch.tensor([0.5])
    with torch.no_grad():
        assert torch.equal(model.velocity(*arguments, condition), model.velocity(*arguments, other))


def test_an_image_has_one_encoding():
    model, pixels = FAMILY.load(), torch.rand(2, 3, 32, 32) * 2 - 1
    drawn = [model.encode_images(pixels, torch.randn(2, *model.latent_shape(32, 32))) for _ in range(2)]
    assert torch.equal(*drawn)
    with torch.no_grad():
        expected = model.vae.encode(pixels).latent * 0.41407
    assert_equal_but_for_rounding(drawn[0], expected)


def test_a_text_encoder_is_never_in_fp16():
    model = FAMILY.block(dtype="fp16").load(CPU, "fp16")
    assert (model.pipeline.text_encoder.dtype, model.transformer.dtype) == (torch.bfloat16, torch.float16)
    assert model.vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        (
            "scheduler/scheduler_config.json",
            {"use_flow_sigmas": False},
            "scheduler_config.json: a DPMSolverMultistepScheduler without use_flow_sigmas: true and "
            "prediction_type: flow_prediction has no flow sigmas",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "has no flow sigmas"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas is true"),
        (
            "model_index.json",
            {"_class_name": "SanaSprintPipeline"},
            "a SanaSprintPipeline, not a SanaPipeline",
        ),
    ],
)
def test_what_is_no_flow_model_is_refused_by_file_and_field(file, fields, said, tmp_path):
    with pytest.raises(ModelError, match=said):
        changed(tmp_path, file, **fields).load(CPU, "fp32")


def test_components_that_do_not_fit_are_named():
    from diffusers import SanaTransformer2DModel

    model = FAMILY.load()
    config = dict(model.transformer.config)
    for field, said in (("out_channels", r"out_channels is 5"), ("caption_channels", "width is 16.*takes 5")):
        model.pipeline.transformer = model.transformer = SanaTransformer2DModel.from_config(
            {**config, field: 5}
        )
        with pytest.raises(ModelError, match=said):
            model.check()


def test_what_is_exported_draws_in_diffusers_and_is_refused_for_comfyui(tmp_path):
    from diffusers import SanaPipeline

    run_quietly(made(FAMILY, tune=lora(FAMILY)), tmp_path / "run")
    trained = trained_at(str(tmp_path / "run"))
    export(trained, tmp_path / "lora", "lora")
    export(trained, tmp_path / "merged", "merged")
    noise = torch.randn(1, *FAMILY.load().latent_shape(32, 32))
    adapted = SanaPipeline.from_pretrained(FAMILY.path)
    plain = FAMILY.draw(adapted, ["a cat"], noise, 2, 3.0, (32, 32))
    adapted.load_lora_weights(str(tmp_path / "lora"))
    found = FAMILY.draw(adapted, ["a cat"], noise, 2, 3.0, (32, 32))
    assert (found - plain).abs().max() > 1e-3
    merged = SanaPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        FAMILY.draw(merged, ["a cat"], noise, 2, 3.0, (32, 32)), found, rtol=1e-4, atol=1e-4
    )
    names = load_file(tmp_path / "lora" / LORA).keys()
    assert {n.split(".lora_")[0].removeprefix("transformer.") for n in names} == {
        f"transformer_blocks.{i}.attn{j}.to_{x}" for i in (0, 1) for j in (1, 2) for x in "qkv"
    }
    for kind in ("comfyui", "kohya"):
        with pytest.raises(ModelError, match=f"format '{kind}' does not fit"):
            export(trained, tmp_path / kind, kind)
    card = (tmp_path / "lora" / "README.md").read_text("utf-8")
    assert "ComfyUI" not in card
    (call,) = [line for line in card.splitlines() if line.startswith("image = ")]
    assert call.endswith(
        "max_sequence_length=24, use_resolution_binning=False, "
        "complex_human_instruction=['draw it', 'prompt: ']).images[0]"
    )


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        # twice these are the 1.18 and 3.21 GB of the transformers in half precision on the hub
        ("Efficient-Large-Model/Sana_600M_512px_diffusers", 591_747_872),
        (NAME, 1_604_462_752),
        ("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers", 4_721_825_952),
    ],
)
def test_the_published_shapes_have_the_published_numbers_of_weights(name, weights):
    outline = Sana(path=name).outline("fp32", torch.device("meta"))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(outline.transformer) == weights
    assert count(outline.vae) == 312_250_275  # 1.25 GB in fp32
    assert [count(e) for e in outline.text_encoders()] == [2_614_341_888]  # 5.23 GB in bf16
    assert set(PUBLISHED[name]) == {"transformer", "vae", "text_encoder", "scheduler"}
    assert Sana(path=name).native_side() == (512 if "512" in name else 1024)
    assert outline.latent_shape(1024, 512) == (32, 32, 16)
    assert origin_of(name)["license_name"] == "nscl-v2-custom"


def test_a_lora_is_that_of_diffusers_example():
    shapes = Sana(path=NAME).transformer_shapes()
    # queries, keys and values of 2240 numbers, in both attentions of 20 blocks
    assert Lora(rank=4).trainable_parameters(shapes) == 20 * 2 * 3 * 4 * (2240 + 2240)
