"""Tests that baselines with pipelines of their own can be evaluated and sampled."""

import json

import pytest
import torch
from families import FAMILIES
from forked import posttrain
from pipelines import pipeline_folder
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from posttrain.errors import DataError, ModelError, RecipeError
from posttrain.flow.sampling_settings import Sampling
from posttrain.models.pipelines import SDXL
from posttrain.models.sd3 import SD3
from posttrain.recipe.file import parse_recipe
from posttrain.stages.artifact import open_sampler
from posttrain.stages.model_choice import model_of

CPU = torch.device("cpu")
TEXT = {
    "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1,
    "num_attention_heads": 4, "projection_dim": 32, "eos_token_id": 2,
}  # fmt: skip


def vae(channels):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        shift_factor=0.1,
        sample_size=32,
    )


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    own = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80, cross_attention_dim=64,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
        vae=vae(4),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sdxl")
    own.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux():
    return FAMILIES["flux"].path


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(f"{pipeline_folder()}/tokenizer")


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_images_belong_to_prompt_and_index(kind, request):
    folder = request.getfixturevalue(kind)
    assert model_of(str(folder)).type == kind
    settings = Sampling(resolution=32, steps=2, guidance=3.0)
    sampler, _ = open_sampler(str(folder), CPU, settings)
    both = sampler.images(["a circle", "a square"], [0, 1], settings)
    assert both.shape == (2, 3, 32, 32)
    assert both.min() >= 0
    assert both.max() <= 1
    # SDXL runs both branches of the guidance, FLUX's guidance is an input
    assert sampler.forward_equivalents == 2 * 2 * (2 if kind == "sdxl" else 1)
    torch.testing.assert_close(sampler.images(["a square"], [1], settings)[0], both[1], atol=1e-4, rtol=0)
    assert (sampler.images(["a square"], [0], settings)[0] - both[1]).abs().max() > 1e-3
    other, _ = open_sampler(str(folder), CPU, settings)
    assert other.fingerprint() == sampler.fingerprint()


def test_eval_and_sample_take_a_pipeline_by_its_index(sdxl, tmp_path):
    (tmp_path / "p.txt").write_text("a circle\na square\n")
    settings = ("--set", "resolution=32", "--set", "steps=2", "--set", "guidance=5")
    reward = ("--prompts", "p.txt", "--reward", "jpeg_compressibility")
    posttrain("eval", sdxl, *reward, *settings, "--output", "e", cwd=tmp_path)
    card = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert card["model"]["source"] == str(sdxl)
    assert card["images"] == 2
    small = ("--resolution", "32", "--steps", "1", "--images", "1")
    posttrain("sample", sdxl, "--prompt", "a circle", *small, cwd=tmp_path)
    assert (tmp_path / "samples" / "grid.png").is_file()


def test_a_recipe_evaluates_them_and_does_not_train_them(flux, sdxl, tmp_path):
    head = f"name: x\nmodel: {{type: sdxl, path: {sdxl}}}\n"
    evaluation = (
        "evaluation: {prompts: {type: shapes, count: 2}, rewards: shapes, resolution: 32, steps: 1}\n"
    )
    (tmp_path / "r.yaml").write_text(head + "tracker: none\ndevice: cpu\nstages: []\n" + evaluation)
    done = posttrain("run", "r.yaml", cwd=tmp_path)
    assert "base" in done.stdout
    assert (tmp_path / "runs" / "x" / "report.html").is_file()
    stage = (
        "stages: [{name: a, algorithm: {type: sft}, data: {type: shapes, images: 4}, train: {steps: 1}}]\n"
    )
    with pytest.raises(RecipeError, match="sdxl can be evaluated, not trained"):
        parse_recipe(head + stage + evaluation, "r.yaml")
    with pytest.raises(RecipeError, match="neither a stage nor an evaluation"):
        parse_recipe(head + "stages: []\n", "r.yaml")
    with pytest.raises(RecipeError, match="is a FluxPipeline, not a StableDiffusionXLPipeline"):
        parse_recipe(head.replace(str(sdxl), str(flux)) + "stages: []\n" + evaluation, "r.yaml")
    with pytest.raises(RecipeError, match=r"model\.revision.*has no effect: only a hub repository"):
        parse_recipe(head.replace("}", ", revision: v2}") + "stages: []\n" + evaluation, "r.yaml")


def test_what_they_cannot_do_is_said(sdxl, tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(ModelError, match="LoRA, and those of sdxl models cannot be loaded"):
        open_sampler(str(tmp_path), CPU, Sampling(resolution=32), base=str(sdxl))
    settings = Sampling(resolution=32, steps=1, solver="dpm2")
    with pytest.raises(DataError, match="its own scheduler"):
        SDXL(path=str(sdxl)).sampler(CPU, settings)
    with pytest.raises(DataError, match=r"guidance 0\.5: .* give 1 or more"):
        SDXL(path=str(sdxl)).sampler(CPU, Sampling(resolution=32, steps=1, guidance=0.5))
    with pytest.raises(ModelError, match="not trained"):
        SDXL(path=str(sdxl)).load(CPU, "fp32")
    assert isinstance(model_of("./nowhere"), SD3)
