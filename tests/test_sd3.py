"""The SD3 model agrees with diffusers' own pipeline, and its artifacts load there."""

import json

import pytest
import torch
from pipelines import assert_equal_but_for_rounding, load, pipeline_folder
from safetensors import safe_open

from posttrain.condition import Conditions
from posttrain.errors import ModelError
from posttrain.flow.guidance import CLASSIFIER_FREE, UNGUIDED
from posttrain.models.sd3 import SD3
from posttrain.policy import Policy
from posttrain.policy.tuning import Full, Lora
from posttrain.sampling.latents import prompt_noise, sample_images, sample_latents
from posttrain.sampling.prompts import encode
from posttrain.weights.transformer import LORA, adapter_entries
from posttrain.weights.writing import entries_of

PROMPTS = ["a photo of a red circle", "a blue square"]


def noise_for(model, prompts):
    shape = model.latent_shape(16, 16)
    return torch.stack([prompt_noise(0, p, 0, shape) for p in prompts])


def diffusers_latents(pipeline, noise, steps, guidance):
    return pipeline(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=16,
        width=16,
        latents=noise.clone(),
        output_type="latent",
        max_sequence_length=16,
    ).images


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_euler_samples_equal_those_of_diffusers(guidance):
    model = load()
    noise = noise_for(model, PROMPTS)
    conditions, rows = encode(model, PROMPTS)
    model.pipeline.set_progress_bar_config(disable=True)
    expected = diffusers_latents(model.pipeline, noise, 10, guidance)
    actual = sample_latents(
        Policy(model), conditions, rows, noise, model.sigmas(10, 16, 16), guidance, "euler"
    )
    assert_equal_but_for_rounding(actual, expected)


def test_the_sigma_grid_is_diffusers_own_with_its_low_last_value():
    sigmas = load().sigmas(10, 16, 16)
    published = [
        1,
        0.960129,
        0.913349,
        0.857692,
        0.790368,
        0.707278,
        0.602151,
        0.464876,
        0.278049,
        0.008929,
        0,
    ]
    torch.testing.assert_close(torch.tensor(sigmas), torch.tensor(published), rtol=0, atol=1e-6)


def test_the_timestep_is_exactly_1000_sigma():
    model, seen = load(), []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    conditions, rows = encode(model, PROMPTS)
    sigma = torch.tensor([0.123456, 0.987654])
    model.velocity(noise_for(model, PROMPTS), sigma, conditions.rows(rows))
    assert torch.equal(seen[0], 1000 * sigma)


def test_images_survive_the_autoencoder_scaling():
    model = load()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = model.encode_images(pixels, torch.zeros(2, *model.latent_shape(16, 16)))
    config = model.vae.config
    mean = model.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(latents / config.scaling_factor + config.shift_factor, mean)
    images = model.decode(latents)
    torch.testing.assert_close(images, (model.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1))


def test_each_distinct_prompt_is_encoded_once_and_row_0_is_the_empty_one():
    model = load()
    conditions, rows = encode(model, ["a red circle", "a blue square", "a red circle"])
    assert isinstance(conditions, Conditions)
    assert rows.tolist() == [1, 2, 1]
    assert all(len(t) == 3 for t in conditions.table.values())
    empty = model.encode_prompts([""])
    for key, alone in empty.items():
        torch.testing.assert_close(conditions.table[key][0], alone[0], rtol=1e-4, atol=1e-5)


def test_a_full_artifact_loads_in_diffusers_and_gives_the_same_samples(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    model = load()
    Full().apply(model.transformer, 0)
    with torch.no_grad():
        for p in model.transformer.parameters():
            p.add_(0.01 * torch.randn_like(p))
    model.save(tmp_path / "final", "fp32", {})
    configs = [file.read_text() for file in (tmp_path / "final").rglob("*.json")]
    assert not any(str(pipeline_folder()) in text for text in configs), "a place on this machine"
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "final")
    pipeline.set_progress_bar_config(disable=True)
    noise = noise_for(model, PROMPTS)
    conditions, rows = encode(model, PROMPTS)
    own = sample_latents(Policy(model), conditions, rows, noise, model.sigmas(4, 16, 16), 4.5, "euler")
    assert_equal_but_for_rounding(diffusers_latents(pipeline, noise, 4, 4.5), own)


def test_a_lora_artifact_loads_in_diffusers_with_its_strength_and_merges_to_the_same_model(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    model = load()
    Lora(rank=4, alpha=12.0).apply(model.transformer, 0)
    trained = [p for p in model.transformer.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))
    noise = noise_for(model, PROMPTS)
    conditions, rows = encode(model, PROMPTS)
    arguments = (conditions, rows, noise, model.sigmas(4, 16, 16), 4.5, "euler")
    own = sample_latents(Policy(model), *arguments)
    weights = entries_of(dict(model.transformer.named_parameters()))
    model.save_lora(tmp_path / "final", weights)
    layers = {n: e.read() for n, e in adapter_entries(model.transformer, weights).items()}
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "diffusers",
        transformer_lora_layers={n: 3 * t if "lora_B" in n else t for n, t in layers.items()},
        transformer_lora_adapter_metadata={
            **model.transformer.peft_config["default"].to_dict(),
            "lora_alpha": 4,
        },
    )
    ours, theirs = (safe_open(tmp_path / f / LORA, "pt") for f in ("final", "diffusers"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours.get_tensor(k), theirs.get_tensor(k)) for k in ours.keys())  # noqa: SIM118
    ours, theirs = (json.loads(f.metadata()["lora_adapter_metadata"]) for f in (ours, theirs))
    name = "transformer.target_modules"
    assert {**ours, name: sorted(ours[name])} == {**theirs, name: sorted(theirs[name])}

    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder())
    pipeline.set_progress_bar_config(disable=True)
    plain = diffusers_latents(pipeline, noise, 4, 4.5)
    pipeline.load_lora_weights(str(tmp_path / "final"))
    torch.testing.assert_close(diffusers_latents(pipeline, noise, 4, 4.5), own, rtol=1e-4, atol=1e-4)
    assert (plain - own).abs().max() > 1e-2

    merged = load()
    merged.load_weights(tmp_path / "final")
    assert not any("lora" in name for name, _ in merged.transformer.named_parameters())
    torch.testing.assert_close(sample_latents(Policy(merged), *arguments), own, rtol=1e-4, atol=1e-4)


def test_lora_matches_the_published_modules_and_counts_its_parameters():
    model = load()
    shapes = {n: tuple(p.shape) for n, p in model.transformer.named_parameters()}
    tune = Lora(rank=4, alpha=8.0)
    tune.apply(model.transformer, 0)
    names = [n for n, p in model.transformer.named_parameters() if p.requires_grad]
    assert not any(".attn2." in n for n in names)
    # block 0: 8 linears; block 1, the last, has no to_add_out
    assert len(names) == 2 * (8 + 7)
    trained = sum(p.numel() for p in model.transformer.parameters() if p.requires_grad)
    assert trained == tune.trainable_parameters(shapes)


@pytest.mark.parametrize("name", ["large", "large-turbo"])
def test_the_published_large_models_have_the_published_number_of_weights_and_a_single_file(name):
    block = SD3(path=f"stabilityai/stable-diffusion-3.5-{name}")
    outline = block.outline("fp32", torch.device("meta"))
    count = lambda tensors: sum(t.numel() for t in tensors)  # noqa: E731
    assert count(outline.transformer.parameters()) == 8_056_627_520
    # in bf16 the 9.99 and 6.31 GB of its two files
    assert 2 * count(outline.transformer.state_dict().values()) == pytest.approx(16.3e9, rel=1e-3)
    assert (block.sides(), block.native_side()) == ((16, 3072), 1024)
    names = outline.transformer.state_dict().keys()
    assert block.single_file().transformer(names).keys() == names
    assert block.origin()["license_link"] == f"https://huggingface.co/{block.path}/blob/main/LICENSE.md"


def test_large_turbo_takes_no_guidance_and_other_models_do():
    path = "stabilityai/stable-diffusion-3.5-large"
    for name, rule in ((path, CLASSIFIER_FREE), (f"{path}-turbo", UNGUIDED)):
        block = SD3(path=name)
        assert block.guidance_rule() is rule
        assert block.outline("fp32", torch.device("meta")).guidance_rule is rule


def test_lora_targets_that_match_nothing_are_named():
    with pytest.raises(ModelError, match=r"'attn\.to_qq'.*attn\.to_q"):
        Lora(targets=["attn.to_q", "attn.to_qq"]).apply(load().transformer, 0)


def test_an_untouched_lora_is_the_base_model_exactly():
    model = load()
    conditions, rows = encode(model, PROMPTS)
    arguments = (noise_for(model, PROMPTS), torch.tensor([0.3, 0.8]), conditions.rows(rows))
    before = model.velocity(*arguments)
    Lora(rank=4).apply(model.transformer, 0)
    assert torch.equal(model.velocity(*arguments), before)


def test_without_text_encoder_3_samples_equal_those_of_diffusers():
    model = load(text_encoder_3=False)
    assert model.pipeline.text_encoder_3 is None
    model.pipeline.set_progress_bar_config(disable=True)
    noise = noise_for(model, PROMPTS)
    conditions, rows = encode(model, PROMPTS)
    own = sample_latents(Policy(model), conditions, rows, noise, model.sigmas(3, 16, 16), 4.5, "euler")
    assert_equal_but_for_rounding(diffusers_latents(model.pipeline, noise, 3, 4.5), own)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    model = load()
    state = load_file(pipeline_folder() / "transformer" / "diffusion_pytorch_model.safetensors")
    wrong = {"proj_out.bias": torch.zeros(3)}
    save_file({**state, **wrong}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match=r"1 of another shape \(proj_out\.bias: \(3,\), not \(16,\)\)"):
        model.load_weights(tmp_path)
    save_file(
        {k: v for k, v in state.items() if k != "proj_out.bias"},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(ModelError, match=r"1 missing \(proj_out\.bias\)"):
        model.load_weights(tmp_path)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./nowhere", "does not exist"),
        ("posttrain/tiny-sd9", "comes with posttrain"),
        ("stabilityai/no-such-model", "local folder"),
    ],
)
def test_a_missing_model_is_one_clear_error(path, words):
    with pytest.raises(ModelError, match=words):
        SD3(path=path).load(torch.device("cpu"), "fp32")


def test_samples_do_not_depend_on_the_batch_they_are_drawn_in():
    policy = Policy(load())
    settings = {"resolution": 16, "steps": 3, "guidance": 3.0}
    together = sample_images(policy, PROMPTS, [0, 0], **settings)
    alone = sample_images(policy, PROMPTS[1:], [0], **settings)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_a_left_out_text_encoder_stays_out_of_the_artifact(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    model = load(text_encoder_3=False)
    model.save(tmp_path / "final", "fp32", {})
    assert not (tmp_path / "final" / "text_encoder_3").exists()
    none = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "final", **none)
    assert load(tmp_path / "final").pipeline.text_encoder_3 is None  # without being told
    own = model.encode_prompts(PROMPTS)["encoder_hidden_states"]
    other = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, max_sequence_length=16)[0]
    torch.testing.assert_close(other, own)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "accept its licence"),
        ("RepositoryNotFoundError", "'some/model' is no folder here.*check the spelling"),
        (
            "OfflineModeIsEnabled",
            "'some/model' is no folder here, so it was looked for on the hub.*local folder's path",
        ),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(kind, words):
    from huggingface_hub import errors

    from posttrain.weights.hugging_face import explained

    class Response:
        headers, request, status_code = {}, None, 403

    more = {} if kind == "OfflineModeIsEnabled" else {"response": Response()}
    error = getattr(errors, kind)("refused", **more)
    with pytest.raises(ModelError, match=words), explained("some/model"):
        raise error


def test_text_encoders_that_do_not_fit_are_named(tmp_path):
    import shutil

    folder = shutil.copytree(pipeline_folder(), tmp_path / "wide")
    config = json.loads((folder / "text_encoder_3" / "config.json").read_text())
    from transformers import T5Config, T5EncoderModel

    T5EncoderModel(T5Config(**{**config, "d_model": 24})).save_pretrained(folder / "text_encoder_3")
    with pytest.raises(ModelError, match="text_encoder_3 does not fit: its width is 24"):
        load(folder)
