"""Names FLUX.1's weights as its authors' checkpoints do, which ComfyUI loads.

The names are facts about the published files (``flux1-dev.safetensors``, ``ae.safetensors``). In the one file
of a checkpoint for ComfyUI the transformer's begin with ``model.diffusion_model.`` and the autoencoder's with
``vae.`` (``vae_key_prefix`` of ``Flux`` in ComfyUI's ``comfy/supported_models.py``). diffusers reads them by
``convert_flux_transformer_checkpoint_to_diffusers``; here is the inverse.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from posttrain.models._sd3_layout import autoencoder_places
from posttrain.weights.single_file import Place, SingleFile, renamed

OUTSIDE = {
    "x_embedder": Place("img_in"),
    "context_embedder": Place("txt_in"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
    "proj_out": Place("final_layer.linear"),
}
"""Layers outside the blocks, as FLUX.1 and FLUX.2 have them."""
DOUBLE = {
    "attn.norm_q": Place("img_attn.norm.query_norm"),
    "attn.norm_k": Place("img_attn.norm.key_norm"),
    "attn.norm_added_q": Place("txt_attn.norm.query_norm"),
    "attn.norm_added_k": Place("txt_attn.norm.key_norm"),
    "attn.to_q": Place("img_attn.qkv", 0, 3),
    "attn.to_k": Place("img_attn.qkv", 1, 3),
    "attn.to_v": Place("img_attn.qkv", 2, 3),
    "attn.add_q_proj": Place("txt_attn.qkv", 0, 3),
    "attn.add_k_proj": Place("txt_attn.qkv", 1, 3),
    "attn.add_v_proj": Place("txt_attn.qkv", 2, 3),
    "attn.to_out.0": Place("img_attn.proj"),
    "attn.to_add_out": Place("txt_attn.proj"),
}
"""Layers of a double block, as both have them."""
SINGLE = {"attn.norm_q": Place("norm.query_norm"), "attn.norm_k": Place("norm.key_norm")}
"""Layers of a single block, as both have them."""
_OUTSIDE = OUTSIDE | {
    "time_text_embed.timestep_embedder.linear_1": Place("time_in.in_layer"),
    "time_text_embed.timestep_embedder.linear_2": Place("time_in.out_layer"),
    "time_text_embed.guidance_embedder.linear_1": Place("guidance_in.in_layer"),
    "time_text_embed.guidance_embedder.linear_2": Place("guidance_in.out_layer"),
    "time_text_embed.text_embedder.linear_1": Place("vector_in.in_layer"),
    "time_text_embed.text_embedder.linear_2": Place("vector_in.out_layer"),
}
_DOUBLE = DOUBLE | {
    "norm1.linear": Place("img_mod.lin"),
    "norm1_context.linear": Place("txt_mod.lin"),
    "ff.net.0.proj": Place("img_mlp.0"),
    "ff.net.2": Place("img_mlp.2"),
    "ff_context.net.0.proj": Place("txt_mlp.0"),
    "ff_context.net.2": Place("txt_mlp.2"),
}
_SINGLE = SINGLE | {
    "norm.linear": Place("modulation.lin"),
    # queries, keys, values and the MLP, which is as wide as four of them
    "attn.to_q": Place("linear1", 0, 7),
    "attn.to_k": Place("linear1", 1, 7),
    "attn.to_v": Place("linear1", 2, 7),
    "proj_mlp": Place("linear1", 3, 7, width=4),
    "proj_out": Place("linear2"),
}


def transformer_places(names: Collection[str]) -> Mapping[str, Place]:
    """The places of the weights ``names`` of a transformer."""
    return places(names, _OUTSIDE, _DOUBLE, _SINGLE)


def places(
    names: Collection[str],
    outside: Mapping[str, Place],
    double: Mapping[str, Place],
    single: Mapping[str, Place],
) -> Mapping[str, Place]:
    """The places of the weights ``names`` by tables of the layers outside the blocks and of each kind of
    block, which have places in their block."""

    def place_of(layer: str) -> Place | None:
        if (found := re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", layer)) is None:
            return outside.get(layer)
        if (place := (single if found[1] else double).get(found[3])) is None:
            return None
        return replace(place, name=f"{'single' if found[1] else 'double'}_blocks.{found[2]}.{place.name}")

    placed = renamed(names, place_of)
    norms = {n: p.name for n, p in placed.items() if p.name.endswith("_norm.weight")}
    return placed | {n: Place(name.removesuffix("weight") + "scale") for n, name in norms.items()}


FLUX = SingleFile(transformer_places, autoencoder_places, kohya_module="networks.lora_flux")
"""The layout of FLUX.1's checkpoints."""
