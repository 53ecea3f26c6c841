"""Names Stable Diffusion 3's weights as its authors' single-file checkpoints do, which ComfyUI loads.

The names are facts about the published files (``sd3.5_medium.safetensors``): the transformer's begin with
``model.diffusion_model.``, the autoencoder's with ``first_stage_model.``. diffusers reads these files by
``convert_sd3_transformer_checkpoint_to_diffusers`` and ``convert_ldm_vae_checkpoint``; here are the inverses.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from posttrain.weights.single_file import Place, SingleFile, renamed

_WHOLE = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_QKV = {
    "attn.to_q": ("x_block.attn.qkv", 0),
    "attn.to_k": ("x_block.attn.qkv", 1),
    "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.add_q_proj": ("context_block.attn.qkv", 0),
    "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn2.to_q": ("x_block.attn2.qkv", 0),
    "attn2.to_k": ("x_block.attn2.qkv", 1),
    "attn2.to_v": ("x_block.attn2.qkv", 2),
}


def transformer_places(names: Collection[str], blocks: int) -> Mapping[str, Place]:
    """The places of the weights ``names`` of a transformer of so many ``blocks``."""
    last = f"transformer_blocks.{blocks - 1}.norm1_context.linear"

    def place_of(layer: str) -> Place | None:
        if layer in _WHOLE:
            return Place(_WHOLE[layer], swapped=layer == "norm_out.linear")
        if (found := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)) is None:
            return None
        block, inner = f"joint_blocks.{found[1]}.", found[2]
        if inner in _QKV:
            name, part = _QKV[inner]
            return Place(block + name, part, 3)
        # the last block's context has a scale and a shift alone, in the other order, as the final layer has
        return Place(block + _BLOCK[inner], swapped=layer == last) if inner in _BLOCK else None

    return renamed(names, place_of)


def autoencoder_places(names: Collection[str]) -> Mapping[str, Place]:
    """The places of the weights ``names`` of an AutoencoderKL, in the layout of latent diffusion."""
    levels = 1 + max((int(n.split(".")[2]) for n in names if n.startswith("decoder.up_blocks.")), default=0)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

    def place_of(layer: str) -> Place | None:
        side, _, inner = layer.partition(".")
        if side in ("quant_conv", "post_quant_conv") or inner in ("conv_in", "conv_out"):
            return Place(layer)
        if inner == "conv_norm_out":
            return Place(f"{side}.norm_out")
        if found := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(.+)", inner):
            return Place(f"{side}.mid.block_{int(found[1]) + 1}.{found[2]}")
        if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", inner):
            sides = 0 if found[1] == "group_norm" else 2
            return Place(f"{side}.mid.attn_1.{attention[found[1]]}", sides=sides)
        if (found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(.+)", inner)) is None:
            return None
        # levels of the decoder are counted from the other end
        level = int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])
        rest = re.sub(r"^resnets\.", "block.", found[3]).replace("conv_shortcut", "nin_shortcut")
        rest = re.sub(r"^(down|up)samplers\.0\.", r"\1sample.", rest)
        return Place(f"{side}.{found[1]}.{level}.{rest}")

    return renamed(names, place_of)


def single_file(blocks: int) -> SingleFile:
    """The layout of the checkpoints of a transformer of so many ``blocks``."""
    return SingleFile(
        lambda names: transformer_places(names, blocks),
        autoencoder_places,
        autoencoder_prefix="first_stage_model.",
    )
