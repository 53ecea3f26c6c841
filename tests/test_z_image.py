"""Z-Image: prompts of many lengths, guidance that starts at 0, the layouts of other tools, and what does not fit."""

import json
import re
import shutil

import pytest
import torch
from families import CPU, FAMILIES
from family_z_image import LENGTH, pipeline
from forked import posttrain
from pipelines import assert_equal_but_for_rounding
from runs import recipe, run_quietly, stage
from safetensors import safe_open
from safetensors.torch import load_file
from test_single_file import in_one_file

from posttrain.errors import ModelError, RecipeError
from posttrain.models._licences import origin_of
from posttrain.models._outline import configs_at
from posttrain.models._z_image_layout import transformer_places
from posttrain.models.z_image import Added, ZImage
from posttrain.policy import Policy
from posttrain.sampling.latents import prompt_noise, sample_latents
from posttrain.sampling.prompts import encode
from posttrain.stages.export import export, trained_at
from posttrain.weights.transformer import LORA

FAMILY = FAMILIES["z_image"]
LONG = "a red circle of green square of blue triangle of red circle of green square of blue triangle of red circle a photo of a red circle"
PROMPTS = ["a blue square", LONG]


def drawn(model, noise, guidance, size, steps=4):
    sigmas = model.sigmas(steps, *size)
    return sample_latents(Policy(model), *encode(model, PROMPTS), noise, sigmas, guidance, "euler")


def noise_for(model, size):
    return torch.stack([prompt_noise(0, p, 0, model.latent_shape(*size)) for p in PROMPTS])


def test_prompts_of_other_lengths_in_the_same_batch_have_no_influence():
    model = FAMILY.load()
    latents, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    condition = model.encode_prompts(PROMPTS)
    lengths = condition["encoder_hidden_states_mask"].sum(1).tolist()
    assert 0 < lengths[0] < 32 < lengths[1] <= LENGTH, "the transformer fills up to 32 and 64 tokens"
    with torch.no_grad():
        both = model.velocity(latents, sigma, condition)
        for i in range(2):
            alone = {name: tensor[i : i + 1] for name, tensor in condition.items()}
            one = model.velocity(latents[i : i + 1], sigma[i : i + 1], alone)
            assert_equal_but_for_rounding(both[i : i + 1], one)
            alone["encoder_hidden_states"] = alone["encoder_hidden_states"].clone()
            alone["encoder_hidden_states"][:, lengths[i] :] = 9.0
            assert torch.equal(model.velocity(latents[i : i + 1], sigma[i : i + 1], alone), one)


@pytest.mark.parametrize("most", [0.0, 1.0, 0.7])
def test_normalised_guidance_of_prompts_of_many_lengths_is_that_of_diffusers(most):
    model = FAMILY.load(cfg_normalization=most)
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    noise = noise_for(model, (32, 16))
    expected = pipeline(
        list(PROMPTS), 32, 16, 4, latents=noise, guidance_scale=4.0, cfg_normalization=most, output_type="pt",
        max_sequence_length=LENGTH,
    ).images  # fmt: skip
    found = model.decode(drawn(model, noise, 4.0, (32, 16)))
    assert_equal_but_for_rounding(found, expected)


def test_a_scale_adds_the_difference_to_the_velocity_and_0_needs_one_forward():
    v_cond, v_uncond = torch.tensor([[[[3.0]], [[4.0]]]]), torch.tensor([[[[3.0]], [[1.0]]]])
    free = Added(0)
    assert [free.needs_empty_prompt(scale) for scale in (0.0, 0.5, 1.0)] == [False, True, True]
    assert free.combined(v_cond, v_uncond, 2.0).flatten().tolist() == [3.0, 10.0]
    # the norm may be 5, that of v_cond
    kept = Added(1).combined(v_cond, v_uncond, 2.0)
    torch.testing.assert_close(kept.flatten(), 5 * torch.tensor([3.0, 10.0]) / 109**0.5)
    assert Added(1).combined(v_cond, torch.tensor([[[[3.0]], [[5.0]]]]), 1.0).flatten().tolist() == [3.0, 3.0]
    assert Added(1).combined(v_cond, 2 * v_cond, 1.0).flatten().tolist() == [0.0, 0.0], "not a number"


def test_the_time_is_1_minus_sigma_and_the_velocity_points_to_the_noise():
    model, seen = FAMILY.load(), []
    model.transformer.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    condition = model.encode_prompts(PROMPTS)
    sigma, latents = torch.tensor([0.25, 0.9]), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        velocity = model.velocity(latents, sigma, condition)
    (given, time, prompts), out = seen[0]
    assert torch.equal(time, 1 - sigma)
    assert torch.equal(torch.stack(given)[:, :, 0], latents)
    assert [len(p) for p in prompts] == condition["encoder_hidden_states_mask"].sum(1).tolist()
    assert torch.equal(velocity, -torch.stack(out[0])[:, :, 0])


def test_a_dynamic_shift_is_that_of_diffusers(tmp_path):
    torch.manual_seed(0)
    dynamic = {"use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 32}
    pipeline(**dynamic).save_pretrained(tmp_path)
    model = ZImage(path=str(tmp_path), max_sequence_length=LENGTH).load(CPU, "fp32")
    for size in FAMILY.sizes:
        noise = noise_for(model, size)
        expected = FAMILY.draw(model.pipeline, PROMPTS, noise, 4, 0.0, size, model=model)
        assert_equal_but_for_rounding(model.decode(drawn(model, noise, 0.0, size)), expected)
    assert model.sigmas(4, 16, 16) != model.sigmas(4, 32, 16)


def test_published_models_have_as_many_weights_as_their_files():
    """6,154,908,736 weights, 24.6 GB in float32 (Z-Image-Turbo) and 12.3 GB in bf16 (Z-Image), on the hub's pages."""
    for path, shift in (("Tongyi-MAI/Z-Image", 6.0), ("Tongyi-MAI/Z-Image-Turbo", 3.0)):
        spec = ZImage(path=path)
        assert sum(torch.Size(shape).numel() for shape in spec.transformer_shapes().values()) == 6_154_908_736
        assert (spec.sides(), spec.native_side()) == ((16, 8192), 1024)
        assert origin_of(path) == {"base_model": path, "license": "apache-2.0"}
        assert configs_at(path)["scheduler"]["shift"] == shift


@pytest.mark.parametrize(
    ("component", "field", "value", "error"),
    [
        ("transformer", "siglip_feat_dim", 8, "transformer/config.json: siglip_feat_dim is 8; for Z-Image it is None"),
        ("transformer", "cap_feat_dim", 24, "text_encoder does not fit: its width is 16, the transformer's cap_feat_dim is 24"),
        ("transformer", "in_channels", 8, "vae does not fit: its latent channels are 4, the transformer's in_channels is 8"),
        ("transformer", "axes_lens", [48, 16, 16], f"model.max_sequence_length is {LENGTH}; the transformer has positions for 32 tokens"),
    ],
)  # fmt: skip
def test_components_that_do_not_fit_are_named(component, field, value, error):
    configs = dict(configs_at(str(FAMILY.path)))
    configs[component] = {**configs[component], field: value}
    with pytest.raises(ModelError, match=re.escape(error)):
        FAMILY.block().outline_of(configs, "fp32", torch.device("meta"))


def head(folder):
    return f"name: small\ntracker: none\ndevice: cpu\nmodel: {{type: z_image, path: {folder}, max_sequence_length: {LENGTH}}}\n"


def test_more_tokens_than_the_transformer_has_positions_for_are_refused_before_weights_are_loaded():
    recipe(stage("s"), head=head(FAMILY.path), overrides=["model.max_sequence_length=64"])
    error = r"model\.max_sequence_length.*the transformer has positions for 64 tokens of a prompt"
    with pytest.raises(RecipeError, match=error):
        recipe(stage("s"), head=head(FAMILY.path), overrides=["model.max_sequence_length=65"])


def test_check_refuses_components_that_do_not_fit(tmp_path):
    folder = shutil.copytree(FAMILY.path, tmp_path / "copy")
    (tmp_path / "small.yaml").write_text(head(folder) + "stages:\n" + stage("s"), "utf-8")
    posttrain("check", "small.yaml", cwd=tmp_path)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"cap_feat_dim": 24}), "utf-8")
    told = posttrain("check", "small.yaml", cwd=tmp_path, code=1).stderr
    assert told.startswith("error: model.path: text_encoder does not fit: its width is 16, the transformer's")


def test_a_folder_of_another_model_and_a_size_beyond_the_positions_are_refused():
    with pytest.raises(
        RecipeError, match=r"model\.path.*is a StableDiffusion3Pipeline, not a ZImagePipeline"
    ):
        recipe(stage("s"), head=head(FAMILIES["sd3"].path))
    with pytest.raises(ModelError, match="68 x 16 px is too large: this model's sides have at most 64 px"):
        FAMILY.load().latent_shape(16, 68)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The folder of a stage that trained a LoRA on attention and feed-forward layers."""
    train = "{steps: 2, batch_size: 2, learning_rate: 1e-2, checkpoint_every: 2, log_every: 1, sample_every: null}"
    tune = f"{{type: lora, rank: 2, targets: {FAMILY.lora['targets']}}}"
    folder = tmp_path_factory.mktemp("lora")
    run_quietly(recipe(stage("s", train=train, tune=tune), head=head(FAMILY.path)), folder)
    return folder / "s"


def products(tensors, a, b):
    names = [name.removesuffix(a) for name in tensors if name.endswith(a)]
    return {name: tensors[name + b] @ tensors[name + a] for name in names}


def test_comfyui_knows_the_keys_of_a_lora(lora):
    """They are ``transformer.`` and diffusers' names, as ``model_lora_keys_unet`` in ComfyUI's comfy/lora.py takes them
    for a Lumina2 model, of which Z-Image is one there; the layers are those of ``z_image_to_diffusers`` in its
    comfy/utils.py, for all three lists of blocks since its commit 5151cff."""
    inner = r"attention\.to_[qkv]|attention\.to_out\.0|feed_forward\.w[123]"
    known = rf"transformer\.(layers|noise_refiner|context_refiner)\.\d+\.({inner})\.lora_[AB]\.weight"
    keys = list(load_file(lora / "final" / LORA))
    assert len(keys) == 2 * 7 * 4, "layers of 4 blocks"
    assert all(re.fullmatch(known, key) for key in keys)
    export(trained_at(str(lora)), lora.parent / "comfyui", "comfyui")
    assert load_file(next((lora.parent / "comfyui").glob("*.safetensors"))).keys() == set(keys)


def test_kohyas_layers_have_the_product_of_their_parts_and_load_in_diffusers(lora):
    from diffusers import ZImagePipeline

    export(trained_at(str(lora)), lora.parent / "kohya", "kohya")
    file = next((lora.parent / "kohya").glob("*.safetensors"))
    own = products(load_file(lora / "final" / LORA), ".lora_A.weight", ".lora_B.weight")
    found = products(load_file(file), ".lora_down.weight", ".lora_up.weight")
    block = "transformer.layers.1"
    qkv = torch.cat([own[f"{block}.attention.to_{name}"] for name in "qkv"])
    torch.testing.assert_close(found["lora_unet_layers_1_attention_qkv"], qkv)
    for name, there in (("attention.to_out.0", "attention_out"), ("feed_forward.w2", "feed_forward_w2")):
        torch.testing.assert_close(found[f"lora_unet_layers_1_{there}"], own[f"{block}.{name}"])
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.lora_zimage"
    read = ZImagePipeline.lora_state_dict(str(file))
    assert {name.rpartition(".lora_")[0] for name in read} == set(own)


def test_diffusers_reads_the_same_transformer_from_one_file():
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    transformer = FAMILY.load().transformer
    state = transformer.state_dict()
    original = in_one_file(transformer, transformer_places, "model.diffusion_model.")
    names = {name.removeprefix("model.diffusion_model.") for name in original}
    assert {
        "x_embedder.weight",
        "final_layer.linear.bias",
        "layers.0.attention.qkv.weight",
        "cap_pad_token",
    } <= names
    found = convert_z_image_transformer_checkpoint_to_diffusers(original)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_captions_are_counted_within_the_chat_template():
    (counts,) = FAMILY.block().token_counts(PROMPTS).values()
    mask = FAMILY.load().encode_prompts(PROMPTS)["encoder_hidden_states_mask"]
    assert list(counts.counts) == mask.sum(1).tolist()
    assert (counts.limit, counts.too_long) == (LENGTH, 0)


def test_the_blocks_are_found():
    from posttrain.policy.blocks import blocks

    assert len(blocks(FAMILY.load().transformer)) == 4


def test_the_recipe_targets_layers_of_the_published_transformer():
    from posttrain.recipe.file import load_recipe

    shipped = load_recipe("z-image-soar-lora", checks=False)
    shapes = shipped.model.transformer_shapes()
    # attention and feed-forward of 34 blocks: 4 square matrices and 3 of 3840 x 10240
    assert shipped.stages[0].tune.trainable_parameters(shapes) == 34 * 32 * (
        4 * 2 * 3840 + 3 * (3840 + 10240)
    )
