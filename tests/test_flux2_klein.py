"""FLUX.2 klein: statistics of a square, a shift by the number of steps, distilled models, other tools' layouts, and what does not fit."""

import json
import math
import re
import shutil

import pytest
import torch
from families import CPU, FAMILIES
from family_flux2_klein import STEPS, pipeline, squares
from hypothesis import given
from hypothesis import strategies as st
from pipelines import assert_equal_but_for_rounding
from runs import recipe, run_quietly, stage
from safetensors import safe_open
from safetensors.torch import load_file
from test_single_file import in_one_file

from posttrain.errors import ModelError, RecipeError
from posttrain.flow.guidance import UNGUIDED
from posttrain.models._flux2_layout import autoencoder_places, transformer_places
from posttrain.models._licences import origin_of
from posttrain.models._outline import configs_at
from posttrain.models._packing import packed, unpacked
from posttrain.models.flux2_klein import Flux2Klein
from posttrain.policy import Policy
from posttrain.policy.tuning import Lora
from posttrain.sampling.latents import prompt_noise, sample_latents
from posttrain.sampling.prompts import encode
from posttrain.stages.export import export, trained_at
from posttrain.stages.model_choice import model_of
from posttrain.weights.transformer import LORA
from posttrain.weights.writing import entries_of

PROMPTS = ["a photo of a red circle", "a blue square"]
BASE = FAMILIES["flux2_klein"]
META = torch.device("meta")
HUB = "black-forest-labs/FLUX.2-klein-"


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """The folder of a pipeline that was distilled to need no guidance."""
    torch.manual_seed(0)
    pipeline(is_distilled=True).save_pretrained(folder := tmp_path_factory.mktemp("distilled"))
    return folder


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_packing_is_that_of_diffusers_and_loses_nothing(n, c, rows, columns):
    from diffusers import Flux2KleinPipeline

    latents = torch.randn(n, c, 2 * rows, 2 * columns)
    tokens = packed(latents)
    assert torch.equal(tokens, Flux2KleinPipeline._pack_latents(squares(latents)))
    assert torch.equal(unpacked(tokens, 2 * rows, 2 * columns), latents)


def test_latents_are_scaled_as_diffusers_scales_those_of_an_image():
    model = BASE.load()
    pixels = torch.rand(2, 3, 16, 32) * 2 - 1
    mean, logvar = model.posterior(pixels)
    with torch.no_grad():
        expected = model.pipeline._encode_vae_image(pixels, None)
    found = squares(model.latents(mean, logvar, torch.zeros_like(mean)))
    assert_equal_but_for_rounding(found, expected)


def test_the_shift_depends_on_the_number_of_steps_and_training_follows_one():
    model = BASE.load()
    times, size = torch.linspace(1, 0, STEPS + 1), model.latent_shape(32, 16)[1:]
    grid = torch.tensor(model.sigmas(STEPS, 32, 16))
    torch.testing.assert_close(grid, model.sigma(times, size), rtol=0, atol=1e-6)
    # the middle of twice as many steps is at another noise level
    twice = model.sigmas(2 * STEPS, 32, 16)[STEPS]
    assert abs(twice - grid[STEPS // 2]) > 1e-3
    other = BASE.load(grid_steps=2 * STEPS)
    assert float(other.sigma(torch.tensor(0.5), size)) == pytest.approx(twice, abs=1e-6)
    assert other.sigmas(STEPS, 32, 16) == model.sigmas(STEPS, 32, 16)


@pytest.mark.parametrize(
    ("side", "steps", "mu"),
    [
        # lines of compute_empirical_mu: slope and intercept at 10 and at 200 steps
        (512, 200, 1.6927e-4 * 1024 + 0.45666666),
        (512, 10, 8.73809524e-5 * 1024 + 1.89833333),
        (1024, 50, 2.0233),
        (1024, 4, 2.2914),
        # above 4300 tokens the number of steps does not matter
        (1056, 4, 1.6927e-4 * 4356 + 0.45666666),
        (1056, 50, 1.6927e-4 * 4356 + 0.45666666),
    ],
)
def test_the_published_models_shift_by_the_authors_formula(side, steps, mu):
    outline = Flux2Klein(path=HUB + "base-4B", grid_steps=steps).outline("bf16", META)
    size = outline.latent_shape(side, side)[1:]
    found = outline.sigma(torch.tensor(0.5), size)
    assert float(found) == pytest.approx(1 / (1 + math.exp(-mu)), abs=2e-5)


def test_a_distilled_model_draws_what_diffusers_draws_and_takes_no_guidance(distilled, tmp_path):
    spec = Flux2Klein(path=str(distilled), max_sequence_length=16)
    model = spec.load(CPU, "fp32")
    noise = torch.stack([prompt_noise(0, p, 0, model.latent_shape(32, 16)) for p in PROMPTS])
    conditions, rows = encode(model, PROMPTS)
    arguments = (conditions, rows, noise, model.sigmas(4, 32, 16))
    latents = sample_latents(Policy(model), *arguments, 1.0, "euler")
    for guidance in (1.0, 4.0):  # diffusers ignores it
        expected = BASE.draw(model.pipeline, PROMPTS, noise, 4, guidance, (32, 16), model=model)
        assert_equal_but_for_rounding(model.decode(latents), expected)
    with pytest.raises(ModelError, match="guidance 4: this model was distilled to need none; give 1"):
        sample_latents(Policy(model), *arguments, 4.0, "euler")
    assert spec.guidance_rule() is spec.outline("fp32", META).guidance_rule is UNGUIDED
    train = "{steps: 1, batch_size: 2, learning_rate: 1e-3, checkpoint_every: 1, log_every: 1, sample_every: null}"
    run_quietly(recipe(stage("s", train=train), head=head(distilled)), tmp_path)
    assert model_of(str(tmp_path / "s")).guidance_rule() is UNGUIDED


@pytest.mark.parametrize(
    ("name", "transformer", "text_encoder"),
    [("4B", 3_875_544_576, 4_022_468_096), ("9B", 9_078_581_248, 8_190_735_360)],
)
def test_published_models_have_as_many_weights_as_their_files(name, transformer, text_encoder):
    """``flux-2-klein-base-4b.safetensors`` has 7,751,105,712 bytes: 2 for each weight, and a header of 16,560.
    The text encoders are Qwen3-4B and 8B (``total_size`` 8,044,936,192 and 16,381,470,720), the autoencoder has 84,046,115."""
    for path in (HUB + f"base-{name}", HUB + name):
        spec = Flux2Klein(path=path)
        outline = spec.outline("bf16", META)
        shapes = spec.transformer_shapes().values()
        assert sum(torch.Size(shape).numel() for shape in shapes) == transformer
        assert sum(p.numel() for p in outline.text_encoders()[0].parameters()) == text_encoder
        assert sum(p.numel() for p in outline.vae.parameters()) == 84_046_115
        assert (spec.sides(), spec.native_side()) == ((16, None), 1024)
        assert (spec.guidance_rule() is UNGUIDED) == ("base" not in path)
        assert origin_of(path)["license"] == ("apache-2.0" if name == "4B" else "other")


def head(folder):
    block = f"{{type: flux2_klein, path: {folder}, max_sequence_length: 16, grid_steps: {STEPS}}}"
    return f"name: small\ntracker: none\ndevice: cpu\nmodel: {block}\n"


def test_check_refuses_a_scale_that_a_distilled_model_cannot_take(distilled):
    reason = r"stages\.0\.algorithm\.cfg_scale_sampling.*4\.5: this model was distilled to need none; give 1"
    with pytest.raises(RecipeError, match=reason):
        recipe(stage("s", "{type: soar}"), head=head(distilled))
    recipe(stage("s", "{type: soar, cfg_scale_sampling: 1.0}"), head=head(distilled))
    recipe(stage("s", "{type: soar}"), head=head(BASE.path))


@pytest.mark.parametrize(
    ("component", "field", "value", "error"),
    [
        ("transformer", "guidance_embeds", True, "transformer/config.json: guidance_embeds is True; FLUX.2 klein has False"),
        ("transformer", "patch_size", 2, "transformer/config.json: patch_size is 2; FLUX.2 klein has 1"),
        ("transformer", "in_channels", 32, "vae does not fit: 4 times its latent channels are 16, the transformer's in_channels is 32"),
        ("text_encoder", "hidden_size", 16, "text_encoder does not fit: 3 times its width is 48, the transformer's joint_attention_dim is 24"),
        ("text_encoder", "num_hidden_layers", 26, "text_encoder does not fit: it has 26 layers; the hidden states after layers 9, 18, 27 are needed"),
    ],
)  # fmt: skip
def test_components_that_do_not_fit_are_named(component, field, value, error):
    configs = dict(configs_at(str(BASE.path)))
    configs[component] = {**configs[component], field: value}
    if field == "num_hidden_layers":
        del configs[component]["layer_types"]
    with pytest.raises(ModelError, match=re.escape(error)):
        BASE.block().outline_of(configs, "fp32", META)


def test_a_folder_of_another_model_or_a_size_that_does_not_fit_is_refused_by_its_field():
    with pytest.raises(
        RecipeError, match=r"model\.path.*is a StableDiffusion3Pipeline, not a Flux2KleinPipeline"
    ):
        recipe(stage("s"), head=head(FAMILIES["sd3"].path))
    evaluation = "evaluation: {prompts: {type: shapes, count: 2}, rewards: shapes, resolution: 18, steps: 2, guidance: 1}\n"
    with pytest.raises(RecipeError, match=r"evaluation\.resolution: 18 is no multiple of the 4 pixels"):
        recipe(stage("s"), head=head(BASE.path), evaluation=evaluation)


def test_a_folder_without_an_encoder_and_a_lora_of_another_model_are_refused_by_name(tmp_path):
    folder = shutil.copytree(BASE.path, tmp_path / "klein")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    reason = r"model_index\.json' names no text_encoder, which a Flux2KleinPipeline needs"
    with pytest.raises(ModelError, match=reason):
        Flux2Klein(path=str(folder)).load(CPU, "fp32")
    other, model = FAMILIES["sd3"].load(), BASE.load()
    Lora(rank=2).apply(other.transformer, 0)
    other.save_lora(tmp_path, entries_of(dict(other.transformer.named_parameters())))
    before = {name: weight.clone() for name, weight in model.transformer.state_dict().items()}
    with pytest.raises(ModelError, match=rf"{LORA}.*transformer_blocks\.1"):
        model.load_weights(tmp_path)
    after = model.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_tokenizer_of_a_text_encoder_with_rotary_positions_may_name_any_length(tmp_path):
    """Qwen3's tokenizer says 131,072 tokens, its network 40,960 positions."""
    folder = shutil.copytree(BASE.path, tmp_path / "klein")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 131_072}))
    model = Flux2Klein(path=str(folder), **BASE.settings).load(CPU, "fp32")
    assert (
        model.pipeline.tokenizer.model_max_length > model.pipeline.text_encoder.config.max_position_embeddings
    )
    found = model.encode_prompts(PROMPTS)["encoder_hidden_states"]
    assert torch.equal(found, BASE.load().encode_prompts(PROMPTS)["encoder_hidden_states"])


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The folder of a stage that trained a LoRA on the layers of the shipped recipe."""
    targets = (
        "[attn.to_q, attn.to_k, attn.to_v, attn.to_out.0, attn.add_q_proj, attn.add_v_proj, attn.to_add_out, "
        "linear_in, linear_out, attn.to_qkv_mlp_proj, attn.to_out, proj_out]"
    )
    train = "{steps: 2, batch_size: 2, learning_rate: 1e-2, checkpoint_every: 2, log_every: 1, sample_every: null}"
    folder = tmp_path_factory.mktemp("lora")
    tune = f"{{type: lora, rank: 2, targets: {targets}}}"
    run_quietly(recipe(stage("s", train=train, tune=tune), head=head(BASE.path)), folder)
    return folder / "s"


def products(tensors):
    """Layer -> B A of a LoRA in diffusers' names."""
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in layers}


def test_comfyui_knows_the_keys_of_a_lora(lora):
    """They are ``transformer.`` and diffusers' names, as ``model_lora_keys_unet`` in ComfyUI's comfy/lora.py takes
    them for a Flux model, of which its Flux2 is one; the layers are those of ``flux_to_diffusers`` in its comfy/utils.py."""
    double = "attn.to_q|attn.to_k|attn.to_v|attn.add_q_proj|attn.add_k_proj|attn.add_v_proj|attn.to_out.0|attn.to_add_out"
    double += "|ff.linear_in|ff.linear_out|ff_context.linear_in|ff_context.linear_out"
    single = "attn.to_qkv_mlp_proj|attn.to_out"
    whole = "proj_out|x_embedder|context_embedder"
    known = rf"transformer\.(transformer_blocks\.\d+\.({double})|single_transformer_blocks\.\d+\.({single})|{whole})"
    keys = list(load_file(lora / "final" / LORA))
    assert len(keys) == 2 * (7 + 4 + 2 + 1)
    assert all(re.fullmatch(rf"{known}\.lora_[AB]\.weight", key) for key in keys)
    export(trained_at(str(lora)), lora.parent / "comfyui", "comfyui")
    assert load_file(next((lora.parent / "comfyui").glob("*.safetensors"))).keys() == set(keys)


def test_diffusers_reads_the_same_lora_from_kohyas_file(lora):
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux2_lora_to_diffusers

    export(trained_at(str(lora)), lora.parent / "kohya", "kohya")
    file = next((lora.parent / "kohya").glob("*.safetensors"))
    found = products(_convert_kohya_flux2_lora_to_diffusers(load_file(file)))
    own = products(load_file(lora / "final" / LORA))
    assert (found.pop("transformer.transformer_blocks.0.attn.add_k_proj") == 0).all(), "keys have no adapter"
    assert found.keys() == own.keys()
    for name, product in own.items():
        torch.testing.assert_close(found[name], product)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.lora_flux_2"  # of kohya's musubi-tuner


def test_diffusers_reads_the_same_networks_from_one_file():
    from diffusers.loaders.single_file_utils import (
        convert_flux2_transformer_checkpoint_to_diffusers,
        convert_ldm_vae_checkpoint,
    )

    model = BASE.load()
    state = model.transformer.state_dict()
    original = in_one_file(model.transformer, transformer_places, "")
    assert "double_blocks.0.img_attn.norm.query_norm.scale" in original
    found = convert_flux2_transformer_checkpoint_to_diffusers(original)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)

    state = model.vae.state_dict()
    original = in_one_file(model.vae, autoencoder_places, "")
    norm = {name: original.pop(name) for name in list(original) if name.startswith("bn.")}
    found = {
        **convert_ldm_vae_checkpoint(
            {f"first_stage_model.{n}": t for n, t in original.items()}, model.vae.config
        ),
        **norm,
    }
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_full_model_for_comfyui_has_the_statistics_of_its_autoencoder(tmp_path):
    """ComfyUI tells this autoencoder by ``bn.running_mean`` (``VAE`` in its comfy/sd.py)."""
    train = "{steps: 1, batch_size: 2, learning_rate: 1e-3, checkpoint_every: 1, log_every: 1, sample_every: null}"
    run_quietly(recipe(stage("s", train=train), head=head(BASE.path)), tmp_path / "run")
    export(trained_at(str(tmp_path / "run")), tmp_path / "one", "comfyui")
    tensors = load_file(next((tmp_path / "one").glob("*.safetensors")))
    assert {name.split(".")[0] for name in tensors} == {"model", "vae"}
    torch.testing.assert_close(tensors["vae.bn.running_mean"], torch.linspace(-0.5, 0.7, 16))
    trained = load_file(next((tmp_path / "run" / "s" / "final" / "transformer").glob("*.safetensors")))
    single = "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"
    assert torch.equal(tensors["model.diffusion_model.single_blocks.0.linear1.weight"], trained[single])
    assert model_of(str(tmp_path / "run" / "s")).type == "flux2_klein"
