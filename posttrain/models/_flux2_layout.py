"""Names FLUX.2's weights as its authors' checkpoints do, which ComfyUI loads.

The names are facts about the published files (``flux-2-klein-base-4b.safetensors``, ``ae.safetensors``). In
the one file of a checkpoint for ComfyUI the transformer's begin with ``model.diffusion_model.`` and the
autoencoder's with ``vae.``. diffusers reads them by ``convert_flux2_transformer_checkpoint_to_diffusers``;
here is the inverse.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from posttrain.models import _sd3_layout
from posttrain.weights.single_file import Place, SingleFile, renamed

_WHOLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_QKV = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
}
_SINGLE = {
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}


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
    if not single and inner in _QKV:
        name, part = _QKV[inner]
        return Place(block + name, part, 3)
    known = _SINGLE if single else _DOUBLE
    return Place(block + known[inner]) if inner in known else None


def autoencoder_places(names: Collection[str]) -> Mapping[str, Place]:
    """The places of the weights ``names`` of an AutoencoderKLFlux2, with the statistics of its batch norm."""
    norm = {name: Place(name) for name in names if name.startswith("bn.")}
    return {**_sd3_layout.autoencoder_places(names), **norm}


FLUX2 = SingleFile(
    transformer_places,
    autoencoder_places,
    "model.diffusion_model.",
    "vae.",
    kohya_module="networks.lora_flux_2",
)
"""The layout of FLUX.2's checkpoints."""
