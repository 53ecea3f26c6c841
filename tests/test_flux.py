"""FLUX.1: guidance as an input, packing, the layouts of other tools, and what does not fit."""

import json
import re
import shutil

import pytest
import torch
from families import CPU, FAMILIES
from family_flux import pipeline
from hypothesis import given
from hypothesis import strategies as st
from pipelines import assert_equal_but_for_rounding
from runs import recipe, run_quietly, stage
from safetensors import safe_open
from safetensors.torch import load_file
from test_single_file import in_one_file

from posttrain.condition import Conditions
from posttrain.errors import ModelError, RecipeError
from posttrain.flow.sampling_settings import Sampling
from posttrain.models._flux_layout import transformer_places
from posttrain.models._licences import origin_of
from posttrain.models._packing import grid_ids, packed, unpacked
from posttrain.models.flux import Flux
from posttrain.policy import Policy
from posttrain.recipe.file import load_recipe, parse_recipe
from posttrain.sampling.latents import prompt_noise, sample_latents
from posttrain.sampling.prompts import encode
from posttrain.stages.artifact import open_sampler, usual_settings
from posttrain.stages.export import export, trained_at
from posttrain.stages.hooks.image_grids import grid_samples
from posttrain.stages.model_choice import model_of
from posttrain.weights.single_file import fused_lora
from posttrain.weights.transformer import LORA

PROMPTS = ["a photo of a red circle", "a blue square"]
DEV = FAMILIES["flux"]


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    """The folder of a pipeline without a guidance embedding, whose shift is 1 at any size."""
    torch.manual_seed(0)
    pipeline(guidance_embeds=False, shift=1.0).save_pretrained(folder := tmp_path_factory.mktemp("schnell"))
    return folder


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_packing_is_that_of_diffusers_and_loses_nothing(n, c, rows, columns):
    from diffusers import FluxPipeline

    latents = torch.randn(n, c, 2 * rows, 2 * columns)
    tokens = packed(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, n, c, 2 * rows, 2 * columns))
    assert torch.equal(unpacked(tokens, 2 * rows, 2 * columns), latents)
    ids = FluxPipeline._prepare_latent_image_ids(n, rows, columns, "cpu", torch.float32)
    assert torch.equal(grid_ids(rows, columns, CPU), ids)


def test_schnell_draws_what_diffusers_draws(schnell):
    model = Flux(path=str(schnell), max_sequence_length=16).load(CPU, "fp32")
    noise = torch.stack([prompt_noise(0, p, 0, model.latent_shape(32, 16)) for p in PROMPTS])
    expected = DEV.draw(model.pipeline, PROMPTS, noise, 4, 1.0, (32, 16), model=model)
    sigmas = model.sigmas(4, 32, 16)
    assert sigmas == [1, 0.75, 0.5, 0.25, 0]
    latents = sample_latents(Policy(model), *encode(model, PROMPTS), noise, sigmas, 1.0, "euler")
    assert_equal_but_for_rounding(model.decode(latents), expected)


def test_without_a_scale_the_network_is_trained_at_train_guidance():
    for settings, scale in (({}, 1.0), ({"train_guidance": 3.5}, 3.5)):
        model = DEV.load(**settings)
        conditions = Conditions(model.encode_prompts(["", *PROMPTS]))
        latents, sigma, rows = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([1, 2])
        policy = Policy(model)
        with torch.no_grad():
            plain = policy.velocity(latents, sigma, conditions.rows(rows))
            at = [policy.guided_velocity(latents, sigma, rows, conditions, g) for g in (scale, scale + 1)]
        assert torch.equal(plain, at[0])
        assert not torch.equal(plain, at[1])


def test_published_models_have_as_many_weights_as_their_files():
    """The sizes of the transformers' files in bf16 (``total_size`` in their index), by 2 bytes a weight."""
    sizes = {
        "black-forest-labs/FLUX.1-dev": 23_802_816_640,
        "black-forest-labs/FLUX.1-schnell": 23_782_357_120,
    }
    for path, size in sizes.items():
        spec = Flux(path=path)
        shapes = spec.transformer_shapes()
        assert 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) == size
        assert (spec.sides(), spec.native_side()) == ((16, None), 1024)
        assert origin_of(path)["license"] == ("other" if "dev" in path else "apache-2.0")
    assert Flux(path=path).guidance_rule().usual == 1
    # the published figures of diffusers' calculate_shift: 0.5 at 256 px, 1.15 at 1024 px
    outline = Flux(path="black-forest-labs/FLUX.1-dev").outline("bf16", torch.device("meta"))
    assert outline.sigma(torch.tensor(0.5), (32, 32)) == pytest.approx(1 / (1 + 2.718281828**-0.5))
    assert outline.sigma(torch.tensor(0.5), (128, 128)) == pytest.approx(1 / (1 + 2.718281828**-1.15))


def head(folder, **fields):
    more = "".join(f", {k}: {v}" for k, v in fields.items())
    block = f"{{type: flux, path: {folder}, max_sequence_length: 16{more}}}"
    return f"name: small\ntracker: none\ndevice: cpu\nmodel: {block}\n"


EVALUATION = "evaluation: {prompts: {type: shapes, count: 2}, rewards: shapes, resolution: 16, steps: 2, guidance: %s}\n"


def test_a_scale_that_schnell_cannot_take_is_refused_with_its_field(schnell):
    reason = "this model was distilled to need none; give 1"
    with pytest.raises(RecipeError, match=rf"stages\.0\.algorithm\.cfg_scale_sampling.*4\.5: {reason}"):
        recipe(stage("s", "{type: soar}"), head=head(schnell))
    with pytest.raises(RecipeError, match=rf"evaluation\.guidance.*3\.5: {reason}"):
        parse_recipe(head(schnell) + "stages: []\n" + EVALUATION % 3.5, "small.yaml")
    with pytest.raises(
        RecipeError, match=r"model\.train_guidance.*has no effect: this model takes no guidance"
    ):
        recipe(stage("s"), head=head(schnell, train_guidance=2.0))
    fitting = recipe(
        stage("s", "{type: soar, cfg_scale_sampling: 1.0}"), head=head(schnell), evaluation=EVALUATION % 1
    )
    assert fitting.evaluation.guidance == 1
    with pytest.raises(ModelError, match=rf"guidance 3\.5: {reason}"):
        open_sampler(str(schnell), CPU, Sampling(resolution=16, guidance=3.5))
    recipe(stage("s", "{type: soar}"), head=head(DEV.path), evaluation=EVALUATION % 3.5)
    with pytest.raises(
        RecipeError, match=rf"cfg_scale_sampling.*3\.5: {reason}"
    ):  # as 'posttrain plan' reads it
        load_recipe("flux-soar-lora", ["model.path=black-forest-labs/FLUX.1-schnell"], checks=False)


def test_images_for_which_nothing_names_a_scale_have_the_models_own(schnell):
    class Source:
        prompts, size = ["a red circle"], (16, 16)

    for folder, scale in ((schnell, 1.0), (DEV.path, 3.5)):
        assert usual_settings(str(folder)) == {"resolution": 16, "guidance": scale}
        assert grid_samples(recipe(stage("s"), head=head(folder)), Source)[1]["guidance"] == scale


@pytest.mark.parametrize(
    ("component", "field", "value", "error"),
    [
        ("transformer", "pooled_projection_dim", 24, "text_encoder does not fit: its width is 16, the transformer's pooled_projection_dim is 24"),
        ("transformer", "joint_attention_dim", 48, "text_encoder_2 does not fit: its width is 32, the transformer's joint_attention_dim is 48"),
        ("transformer", "in_channels", 32, "vae does not fit: 4 times its latent channels are 16, the transformer's in_channels is 32"),
        ("transformer", "patch_size", 2, "transformer/config.json: patch_size is 2; FLUX has 1"),
    ],
)  # fmt: skip
def test_components_that_do_not_fit_are_named(component, field, value, error):
    from posttrain.models._outline import configs_at

    configs = dict(configs_at(str(DEV.path)))
    configs[component] = {**configs[component], field: value}
    with pytest.raises(ModelError, match=re.escape(error)):
        DEV.block().outline_of(configs, "fp32", torch.device("meta"))


def test_a_folder_without_an_encoder_or_of_another_model_is_refused_by_name(tmp_path):
    folder = shutil.copytree(DEV.path, tmp_path / "flux")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": [None, None]}))
    with pytest.raises(
        ModelError, match=r"model_index\.json' names no text_encoder_2, which a FluxPipeline needs"
    ):
        Flux(path=str(folder)).load(CPU, "fp32")
    with pytest.raises(RecipeError, match=r"model\.path.*is a StableDiffusion3Pipeline, not a FluxPipeline"):
        recipe(stage("s"), head=head(FAMILIES["sd3"].path))
    with pytest.raises(RecipeError, match=r"evaluation\.resolution: 18 is no multiple of the 4 pixels"):
        recipe(
            stage("s"),
            head=head(DEV.path),
            evaluation=(EVALUATION % 1).replace("resolution: 16", "resolution: 18"),
        )


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The folder of a stage that trained a LoRA on every kind of layer that tools fuse."""
    targets = "[attn.to_q, attn.to_k, attn.to_v, attn.add_q_proj, attn.add_v_proj, attn.to_add_out, ff.net.2, proj_mlp, proj_out]"
    train = "{steps: 2, batch_size: 2, learning_rate: 1e-2, checkpoint_every: 2, log_every: 1, sample_every: null}"
    folder = tmp_path_factory.mktemp("lora")
    tune = f"{{type: lora, rank: 2, targets: {targets}}}"
    run_quietly(recipe(stage("s", train=train, tune=tune), head=head(DEV.path)), folder)
    return folder / "s"


def products(tensors, a, b):
    return {
        name.removesuffix(a): tensors[name.removesuffix(a) + b] @ tensors[name]
        for name in tensors
        if name.endswith(a)
    }


def test_comfyui_knows_the_keys_of_a_lora(lora):
    """They are ``transformer.`` and diffusers' names, as ``model_lora_keys_unet`` in ComfyUI's comfy/lora.py takes
    them for a Flux model; the layers are those of ``flux_to_diffusers`` in its comfy/utils.py."""
    double = "attn.to_q|attn.to_k|attn.to_v|attn.add_q_proj|attn.add_k_proj|attn.add_v_proj|attn.to_out.0|attn.to_add_out"
    double += (
        r"|norm1.linear|norm1_context.linear|ff.net.0.proj|ff.net.2|ff_context.net.0.proj|ff_context.net.2"
    )
    single = "attn.to_q|attn.to_k|attn.to_v|proj_mlp|proj_out|norm.linear"
    whole = "proj_out|x_embedder|context_embedder"
    known = rf"transformer\.(transformer_blocks\.\d+\.({double})|single_transformer_blocks\.\d+\.({single})|{whole})"
    keys = list(load_file(lora / "final" / LORA))
    assert len(keys) == 26
    assert all(re.fullmatch(rf"{known}\.lora_[AB]\.weight", key) for key in keys)
    export(trained_at(str(lora)), lora.parent / "comfyui", "comfyui")
    assert load_file(next((lora.parent / "comfyui").glob("*.safetensors"))).keys() == set(keys)


def test_kohyas_layers_have_the_product_of_their_parts(lora):
    export(trained_at(str(lora)), lora.parent / "kohya", "kohya")
    file = next((lora.parent / "kohya").glob("*.safetensors"))
    own = products(load_file(lora / "final" / LORA), ".lora_A.weight", ".lora_B.weight")
    found = products(load_file(file), ".lora_down.weight", ".lora_up.weight")
    single, double = "transformer.single_transformer_blocks.0", "transformer.transformer_blocks.0"
    parts = [own[f"{single}.{name}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    torch.testing.assert_close(found.pop("lora_unet_single_blocks_0_linear1"), torch.cat(parts))
    torch.testing.assert_close(found.pop("lora_unet_single_blocks_0_linear2"), own[f"{single}.proj_out"])
    q, v = own[f"{double}.attn.add_q_proj"], own[f"{double}.attn.add_v_proj"]
    qkv = torch.cat([q, torch.zeros_like(q), v])  # keys have no adapter
    torch.testing.assert_close(found.pop("lora_unet_double_blocks_0_txt_attn_qkv"), qkv)
    torch.testing.assert_close(found.pop("lora_unet_double_blocks_0_img_mlp_2"), own[f"{double}.ff.net.2"])
    torch.testing.assert_close(found.pop("lora_unet_final_layer_linear"), own["transformer.proj_out"])
    assert found.keys() == {
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_double_blocks_0_txt_attn_proj",
    }
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.lora_flux"


def test_an_adapter_of_the_mlp_alone_is_at_its_rows_of_the_fused_layer():
    down, up = torch.randn(2, 3), torch.randn(16, 2)  # the MLP is four times as wide as the queries
    fused = fused_lora({"single_transformer_blocks.4.proj_mlp": (down, up)}, transformer_places)
    ((name, (a, b)),) = fused.items()
    assert name == "single_blocks.4.linear1"
    assert torch.equal(b @ a, torch.cat([torch.zeros(12, 3), up @ down]))


def test_diffusers_reads_the_same_transformer_from_one_file():
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    transformer = DEV.load().transformer
    state = transformer.state_dict()
    original = in_one_file(transformer, transformer_places, "model.diffusion_model.")
    assert "model.diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale" in original
    split = {}
    for end in ("weight", "bias"):
        key = f"model.diffusion_model.single_blocks.0.linear1.{end}"
        split[end] = original[key].split([32, 32, 32, 128])
        original[key] = torch.zeros(
            7 * 3072, *original[key].shape[1:]
        )  # diffusers expects the published width
    found = convert_flux_transformer_checkpoint_to_diffusers(original)
    for end in ("weight", "bias"):
        for name, part in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), split[end], strict=True):
            found[f"single_transformer_blocks.0.{name}.{end}"] = part
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_full_model_for_comfyui_has_the_autoencoder_under_its_prefix(tmp_path):
    train = "{steps: 1, batch_size: 2, learning_rate: 1e-3, checkpoint_every: 1, log_every: 1, sample_every: null}"
    run_quietly(recipe(stage("s", train=train), head=head(DEV.path)), tmp_path / "run")
    export(trained_at(str(tmp_path / "run")), tmp_path / "one", "comfyui")
    tensors = load_file(next((tmp_path / "one").glob("*.safetensors")))
    prefixes = {name.split(".")[0] for name in tensors}
    assert prefixes == {"model", "vae"}
    trained = load_file(next((tmp_path / "run" / "s" / "final" / "transformer").glob("*.safetensors")))
    assert torch.equal(tensors["model.diffusion_model.img_in.weight"], trained["x_embedder.weight"])
    assert model_of(str(tmp_path / "run" / "s")).type == "flux"
