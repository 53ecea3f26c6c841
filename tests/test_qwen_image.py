"""What Qwen-Image has beside the laws of all families: its guidance, prompts, configurations and LoRA names."""

import json
import shutil

import pytest
import torch
from families import CPU, FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from pipelines import assert_equal_but_for_rounding
from safetensors.torch import load_file

from posttrain.algorithms.flow_grpo import FlowGRPO
from posttrain.engine.rehearsal import rehearse
from posttrain.errors import ModelError
from posttrain.flow.rectified import guided
from posttrain.models._packing import packed, unpacked
from posttrain.models.qwen_image import NormKept, QwenImage
from posttrain.policy.tuning import Lora
from posttrain.weights.transformer import LORA
from posttrain.weights.writing import entries_of

FAMILY = FAMILIES["qwen_image"]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_a_token_is_a_square_of_all_channels_and_unpacking_gives_the_latents_back(c, rows, columns, seed):
    latents = torch.randn(2, c, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(seed))
    tokens = packed(latents)
    assert torch.equal(unpacked(tokens, 2 * rows, 2 * columns), latents)
    row, column = rows - 1, columns - 1
    square = latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(tokens[:, row * columns + column], square.flatten(1))


@given(st.floats(0, 10), st.integers(0, 99))
def test_guidance_turns_every_tokens_velocity_and_keeps_its_norm(scale, seed):
    v_cond, v_uncond = torch.randn(2, 1, 4, 4, 6, generator=torch.Generator().manual_seed(seed))
    turned = packed(NormKept().combined(v_cond, v_uncond, scale))
    plain, given_ = packed(guided(v_cond, v_uncond, scale)), packed(v_cond)
    torch.testing.assert_close(turned.norm(dim=-1), given_.norm(dim=-1))
    alike = torch.nn.functional.cosine_similarity(turned, plain, dim=-1)
    torch.testing.assert_close(alike, torch.ones_like(alike))


def test_an_algorithm_is_rehearsed_under_this_guidance():
    algorithm = FlowGRPO(guidance_scale=4.0, beta=0)
    kept = rehearse(algorithm, NormKept())
    assert kept == rehearse(algorithm)
    # latents and next_latents, float32
    assert kept.item_bytes[1] == 2 * 4 * kept.items


def test_velocities_that_cancel_give_no_velocity_and_a_finite_gradient():
    v = torch.ones(1, 1, 2, 2, requires_grad=True)
    out = NormKept().combined(v, 2 * v.detach(), 2.0)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert v.grad is not None
    assert torch.isfinite(v.grad).all()


def test_the_empty_prompt_is_the_space_that_its_authors_guide_with():
    model = FAMILY.load()
    empty, space, other = (model.encode_prompts([p]) for p in ("", " ", "red"))
    assert all(torch.equal(empty[name], space[name]) for name in empty)
    assert not torch.equal(empty["encoder_hidden_states"], other["encoder_hidden_states"])


def test_the_number_of_padding_tokens_changes_nothing():
    short, long = FAMILY.load(max_sequence_length=12), FAMILY.load(max_sequence_length=26)
    prompts, sigma = ["a photo of a red circle", "a blue square"], torch.tensor([0.3, 0.7])
    latents = torch.randn(2, *short.latent_shape(16, 16))
    with torch.no_grad():
        one, other = (m.velocity(latents, sigma, m.encode_prompts(prompts)) for m in (short, long))
    assert_equal_but_for_rounding(one, other)
    cut = FAMILY.load(max_sequence_length=3).encode_prompts(prompts)
    torch.testing.assert_close(
        cut["encoder_hidden_states"], short.encode_prompts(prompts)["encoder_hidden_states"][:, :3]
    )


FAULTS = [
    ("transformer", {"guidance_embeds": True}, r"transformer/config\.json: guidance_embeds is True.*False"),
    ("transformer", {"use_additional_t_cond": True}, "use_additional_t_cond is True"),
    ("transformer", {"zero_cond_t": True}, "zero_cond_t is True"),
    ("transformer", {"patch_size": 1}, "patch_size is 1; for Qwen-Image it is 2"),
    ("transformer", {"in_channels": 64}, "make 16 channels, the transformer's in_channels is made for 64"),
    ("transformer", {"joint_attention_dim": 8}, "width is 16, the transformer's joint_attention_dim is 8"),
    ("vae", {"latents_std": [1.0]}, r"vae/config\.json: latents_std has 1 numbers for 4 channels"),
    ("vae", {"input_channels": 4}, r"vae/config\.json: input_channels is 4; for RGB it is 3"),
]


@pytest.mark.parametrize(("component", "change", "message"), FAULTS, ids=lambda v: str(v)[:40])
def test_a_configuration_that_it_does_not_know_is_refused_by_name(component, change, message, tmp_path):
    copied = shutil.copytree(FAMILY.path, tmp_path / "copy")
    file = copied / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(ModelError, match=message):
        # the weights of a network of another shape do not fit it, so the configurations alone are loaded
        QwenImage(path=str(copied), max_sequence_length=20).outline("fp32", torch.device("meta"))


def test_a_folder_of_another_family_and_a_missing_encoder_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"StableDiffusion3Pipeline.*QwenImagePipeline"):
        QwenImage(path=str(FAMILIES["sd3"].path)).load(CPU, "fp32")
    copied = shutil.copytree(FAMILY.path, tmp_path / "copy")
    shutil.rmtree(copied / "text_encoder")
    with pytest.raises(ModelError, match="lacks the folder text_encoder"):
        QwenImage(path=str(copied)).load(CPU, "fp32")


def test_a_loras_names_are_those_of_comfyuis_loader_and_another_models_is_refused(tmp_path):
    """ComfyUI's ``comfy/lora.py`` maps ``transformer.NAME`` to each weight NAME of its own QwenImage, whose
    names are diffusers' (``model_lora_keys_unet``)."""
    model = FAMILY.load()
    Lora(rank=2).apply(model.transformer, 0)
    model.save_lora(tmp_path, entries_of(dict(model.transformer.named_parameters())))
    layers = {name.partition(".lora_")[0] for name in load_file(tmp_path / LORA)}
    inner = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    assert layers == {f"transformer.transformer_blocks.{i}.attn.{name}" for i in range(2) for name in inner}
    with pytest.raises(ModelError, match="does not fit"):
        FAMILIES["sd3"].load().load_weights(tmp_path)


def test_the_published_model_has_the_published_number_of_weights_and_size():
    model = QwenImage(path="Qwen/Qwen-Image")
    shapes = model.transformer_shapes() or {}
    # as huggingface.co/Qwen/Qwen-Image counts its transformer
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 20_430_401_088
    assert (model.native_side(), model.sides()) == (1024, (16, None))
    assert model.origin() == {"base_model": "Qwen/Qwen-Image", "license": "apache-2.0"}
