"""What Qwen-Image 2.1 has beside the laws of all families: positions, white, prompts, configurations, LoRA names."""

import json
import shutil

import pytest
import torch
from families import CPU, FAMILIES
from pipelines import assert_equal_but_for_rounding
from safetensors.torch import load_file

from posttrain.errors import ModelError
from posttrain.importing.models import kind_of
from posttrain.models.qwen_image import QwenImage
from posttrain.models.qwen_image_21 import QwenImage21
from posttrain.planning.counts import Counts
from posttrain.policy.tuning import Lora
from posttrain.weights.transformer import LORA
from posttrain.weights.writing import entries_of

FAMILY = FAMILIES["qwen_image_21"]
HUB = "Qwen/Qwen-Image-2.1"
META = torch.device("meta")
PROMPTS = ["a photo of a red circle", "a blue square"]


def test_the_velocity_is_that_of_the_pipelines_own_call_of_each_prompt():
    """In one call, also where diffusers gives all of its rows the positions of the longest prompt."""
    model = FAMILY.load()
    latents, sigma = torch.randn(2, *model.latent_shape(64, 32)), torch.tensor([0.3, 0.8])
    height, width = latents.shape[-2:]
    with torch.no_grad():
        found = model.velocity(latents, sigma, model.encode_prompts(PROMPTS))
        for row, prompt in enumerate(PROMPTS):
            embeds, mask, slots = model.pipeline.encode_prompt([prompt])
            expected = model.transformer(
                hidden_states=latents[row : row + 1].flatten(2).transpose(1, 2),
                timestep=sigma[row : row + 1],
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, height, width)]],
                img_mask=torch.cat([slots, slots.new_ones(1, height * width // 4)], dim=1),
                return_dict=False,
            )[0]
            image = expected[0, -height * width :].T.reshape(latents[row].shape)
            assert_equal_but_for_rounding(found[row], image)


def test_the_number_of_padding_tokens_changes_nothing():
    short, long = FAMILY.load(max_sequence_length=16), FAMILY.load(max_sequence_length=31)
    latents, sigma = torch.randn(2, *short.latent_shape(64, 32)), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        one, other = (m.velocity(latents, sigma, m.encode_prompts(PROMPTS)) for m in (short, long))
    assert_equal_but_for_rounding(one, other)
    cut = FAMILY.load(max_sequence_length=5).encode_prompts(PROMPTS)
    torch.testing.assert_close(
        cut["encoder_hidden_states"], short.encode_prompts(PROMPTS)["encoder_hidden_states"][:, :5]
    )


def test_the_pipelines_own_call_is_as_before_after_a_velocity():
    model = FAMILY.load()
    latents = torch.randn(1, *model.latent_shape(64, 32))
    call = (model.pipeline, PROMPTS[:1], latents, 2, 1.0, (64, 32))
    before = FAMILY.draw(*call, model=model)
    with torch.no_grad():
        model.velocity(latents, torch.tensor([0.5]), model.encode_prompts(PROMPTS[:1]))
    assert torch.equal(FAMILY.draw(*call, model=model), before)


def test_what_is_transparent_is_white_and_an_image_is_opaque(monkeypatch):
    model = FAMILY.load()
    drawn = torch.tensor([0.5, -3.0, 2.0, -1.0, 0.5, -3.0, 2.0, 1.5, 0.5, -3.0, 2.0, 0.0]).reshape(
        3, 4, 1, 1, 1
    )
    monkeypatch.setattr(model.vae, "decode", lambda latents: type("Output", (), {"sample": drawn}))
    found = model.decoded(torch.zeros(3, 4, 2, 2))[..., 0, 0]
    assert found.tolist() == [[1, 1, 1], [0.5, -1, 1], [0.75, 0, 1]]
    broken = drawn.clone()
    broken[0, 3] = torch.inf
    monkeypatch.setattr(model.vae, "decode", lambda latents: type("Output", (), {"sample": broken}))
    assert model.decoded(torch.zeros(3, 4, 2, 2))[0].isnan().all()
    seen, encode = [], model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda pixels: seen.append(pixels) or encode(pixels))
    with torch.no_grad():
        model.encoded(torch.full((2, 3, 32, 32), 0.25))
    assert seen[0].shape == (2, 4, 1, 32, 32)
    assert (seen[0][:, :3] == 0.25).all()
    assert (seen[0][:, 3] == 1).all()


def test_the_empty_prompt_is_a_space_as_in_the_pipeline():
    model = FAMILY.load()
    empty, space, other = (model.encode_prompts([p]) for p in ("", " ", "red"))
    assert all(torch.equal(empty[name], space[name]) for name in empty)
    assert not torch.equal(empty["encoder_hidden_states"], other["encoder_hidden_states"])


FAULTS = [
    ("transformer", {"patch_size": 2}, r"transformer/config\.json: patch_size is 2; for Qwen-Image 2\.1 it is 1"),
    ("transformer", {"in_channels": 8}, "its latent channels are 4, the transformer's in_channels is 8"),
    ("transformer", {"out_channels": 8}, "its latent channels are 4, the transformer's out_channels is 8"),
    ("transformer", {"context_in_dim": 8}, "its width is 16, the transformer's context_in_dim is 8"),
    ("vae", {"latents_std": [1.0]}, r"vae/config\.json: latents_std has 1 numbers for 4 channels"),
    ("vae", {"in_channels": 3}, r"vae/config\.json: in_channels is 3; for RGBA it is 4"),
    (".", {"sample_sigmas": [1.0, 0.5]}, r"sample_sigmas lists the noise levels of a distilled model \(Turbo\)"),
]  # fmt: skip


@pytest.mark.parametrize(("component", "change", "message"), FAULTS, ids=lambda v: str(v)[:40])
def test_a_configuration_that_it_does_not_know_is_refused_by_name(component, change, message, tmp_path):
    copied = shutil.copytree(FAMILY.path, tmp_path / "copy")
    file = copied / component / ("model_index.json" if component == "." else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change), "utf-8")
    spec = QwenImage21(path=str(copied), max_sequence_length=20)
    with pytest.raises(ModelError, match=message):
        spec.outline("fp32", META)
    assert (spec.unfit() or "") != "", "posttrain check says so too"


def test_a_folder_of_the_first_qwen_image_is_refused_and_the_reverse():
    with pytest.raises(ModelError, match=r"QwenImagePipeline.*QwenImage21Pipeline"):
        QwenImage21(path=str(FAMILIES["qwen_image"].path)).load(CPU, "fp32")
    with pytest.raises(ModelError, match=r"QwenImage21Pipeline.*QwenImagePipeline"):
        QwenImage(path=str(FAMILY.path)).load(CPU, "fp32")


def test_a_loras_names_are_those_of_comfyuis_loader(tmp_path):
    """ComfyUI's QwenImage21 is a QwenImage, whose loader maps ``transformer.NAME`` to each weight NAME of its
    own (``model_lora_keys_unet`` in ``comfy/lora.py``); the attention's are named as diffusers'."""
    model = FAMILY.load()
    Lora(rank=2).apply(model.transformer, 0)
    model.save_lora(tmp_path, entries_of(dict(model.transformer.named_parameters())))
    layers = {name.partition(".lora_")[0] for name in load_file(tmp_path / LORA)}
    inner = ("to_q", "to_k", "to_v", "to_out.0")
    assert layers == {f"transformer.transformer_blocks.{i}.attn.{name}" for i in range(2) for name in inner}


def test_captions_are_counted_with_what_stands_around_them():
    (counts,) = FAMILY.block().token_counts(["red", "a red circle"]).values()
    mask = FAMILY.load().encode_prompts(["red", "a red circle"])["encoder_hidden_states_mask"]
    assert (counts.limit, list(counts.counts)) == (20, mask.sum(1).tolist())


def test_the_published_network_has_as_many_weights_as_the_bytes_of_its_turbo_files():
    model = QwenImage21(path=HUB)
    shapes = model.transformer_shapes() or {}
    weights = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert weights == 7_115_124_736
    # the two files of Qwen-Image-2.1-Turbo, the same network, in bf16, with their headers
    assert 0 < 9_968_332_504 + 4_261_951_904 - 2 * weights < 100_000
    assert (model.native_side(), model.sides()) == (2048, (32, None))
    assert model.origin()["license_name"] == "qwen-research"


def test_another_trainers_name_of_it_is_this_type_and_turbo_is_none():
    kinds = {name: kind_of(f"Qwen/Qwen-Image{name}") for name in ("", "-2512", "-2.1", "-2.1-Turbo")}
    assert kinds == {"": "qwen_image", "-2512": "qwen_image", "-2.1": "qwen_image_21", "-2.1-Turbo": ""}


def test_a_plan_counts_it_from_its_published_configuration():
    counts = Counts(QwenImage21(path=HUB), cuda=True)
    tokens = 4096 + 520  # an image of 1024 px, and a prompt
    assert counts.flops("forward", (1024, 1024)) == pytest.approx(2 * 7.1e9 * tokens, rel=0.15)
    assert counts.latent_shape((1024, 1024)) == (64, 64, 64)
