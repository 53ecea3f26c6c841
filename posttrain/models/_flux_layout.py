"""Names FLUX.1's weights as its authors' checkpoints do, which ComfyUI loads.

The names are facts about the published files (``flux1-dev.safetensors``, ``ae.safetensors``). In the one file
of a checkpoint for ComfyUI the transformer's begin with ``model.diffusion_model.`` and the autoencoder's with
``vae.`` (``vae_key_prefix`` of ``Flux`` in ComfyUI's ``comfy/supported_models.py``). diffusers reads them by
``convert_flux_transformer_checkpoint_to_diffusers``; here is the inverse.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from posttrain.models._sd3_layout import autoencoder_places
from posttrain.weights.single_file import Place, SingleFile, renamed

_WHOLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_DOUBLE_QKV = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
# queries, keys, values and the MLP, which is as wide as four of them
_LINEAR1 = {"attn.to_q": (0, 1), "attn.to_k": (1, 1), "attn.to_v": (2, 1), "proj_mlp": (3, 4)}


def transformer_places(names: Collection[str]) -> Mapping[str, Place]:
    """The places of the weights ``names`` of a transformer."""
    places = renamed(names, _place_of)
    for name, place in places.items():
        if place.name.endswith("_norm.weight"):
            places[name] = Place(place.name.removesuffix("weight") + "scale")
    return places


def _place_of(layer: str) -> Place | None:
    if layer in _WHOLE:
        return Place(_WHOLE[layer], swapped=layer == "norm_out.linear")
    if (found := re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", layer)) is None:
        return None
    single, number, inner = found.groups()
    block = f"{'single' if single else 'double'}_blocks.{number}."
    if single and inner in _LINEAR1:
        part, width = _LINEAR1[inner]
        return Place(f"{block}linear1", part, 7, width=width)
    if not single and inner in _DOUBLE_QKV:
        name, part = _DOUBLE_QKV[inner]
        return Place(block + name, part, 3)
    known = _SINGLE if single else _DOUBLE
    return Place(block + known[inner]) if inner in known else None


FLUX = SingleFile(
    transformer_places,
    autoencoder_places,
    "model.diffusion_model.",
    "vae.",
    kohya_module="networks.lora_flux",
)
"""The layout of FLUX.1's checkpoints."""
