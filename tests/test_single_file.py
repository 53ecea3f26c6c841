"""Weights in the layout of Stable Diffusion 3's authors are those that diffusers reads from it."""

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from pipelines import load

from posttrain.errors import ModelError
from posttrain.models._sd3_layout import autoencoder_places, transformer_places
from posttrain.weights.single_file import placed
from posttrain.weights.writing import entries_of


def in_one_file(module, places, prefix):
    """The tensors of ``module`` in the layout of a single file."""
    state = module.state_dict()
    return {n: e.read() for n, e in placed(entries_of(state), places(state), prefix).items()}


def read_back(original):
    """diffusers' state of the transformer whose single-file tensors are ``original``."""
    return convert_sd3_transformer_checkpoint_to_diffusers(dict(original))


def transformer_in_one_file(transformer):
    blocks = transformer.config.num_layers
    return in_one_file(transformer, lambda names: transformer_places(names, blocks), "model.diffusion_model.")


def test_diffusers_reads_the_same_transformer_from_one_file():
    """The tiny model has every kind of layer that SD3.5 Medium has: attn2 in block 0, and a last block without."""
    transformer = load().transformer
    state, original = transformer.state_dict(), transformer_in_one_file(transformer)
    assert all(name.startswith("model.diffusion_model.") for name in original)
    assert original["model.diffusion_model.joint_blocks.0.x_block.attn2.qkv.weight"].shape == (48, 16)
    found = read_back(original)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    moved = state["norm_out.linear.bias"]
    assert torch.equal(original["model.diffusion_model.final_layer.adaLN_modulation.1.bias"], moved.roll(16))


@pytest.mark.parametrize("quant", [False, True])
def test_diffusers_reads_the_same_autoencoder_from_one_file(quant):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2, latent_channels=4, norm_num_groups=4, use_quant_conv=quant, use_post_quant_conv=quant,
    )  # fmt: skip
    state, original = vae.state_dict(), in_one_file(vae, autoencoder_places, "first_stage_model.")
    assert original["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    found = convert_ldm_vae_checkpoint(dict(original), vae.config)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_weight_without_a_place_or_without_its_parts_is_named():
    state = entries_of(load().transformer.state_dict())
    more = {**state, "more.weight": state["proj_out.weight"]}
    with pytest.raises(ModelError, match=r"1 weights have no place in a single file: more\.weight"):
        placed(more, transformer_places(more, 2), "")
    del state["transformer_blocks.0.attn.to_k.weight"]
    with pytest.raises(ModelError, match=r"'joint_blocks\.0\.x_block\.attn\.qkv\.weight' needs 3 parts"):
        placed(state, transformer_places(state, 2), "")
