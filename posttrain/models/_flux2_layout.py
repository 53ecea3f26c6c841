"""Names FLUX.2's weights as its authors' checkpoints do, which ComfyUI loads.

The names are facts about the published files (``flux-2-klein-base-4b.safetensors``, ``ae.safetensors``). In
the one file of a checkpoint for ComfyUI the transformer's begin with ``model.diffusion_model.`` and the
autoencoder's with ``vae.``. diffusers reads them by ``convert_flux2_transformer_checkpoint_to_diffusers``;
here is the inverse.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from posttrain.models import _sd3_layout
from posttrain.models._flux_layout import DOUBLE, OUTSIDE, SINGLE, places
from posttrain.weights.single_file import Place, SingleFile

_OUTSIDE = OUTSIDE | {
    "time_guidance_embed.timestep_embedder.linear_1": Place("time_in.in_layer"),
    "time_guidance_embed.timestep_embedder.linear_2": Place("time_in.out_layer"),
    "double_stream_modulation_img.linear": Place("double_stream_modulation_img.lin"),
    "double_stream_modulation_txt.linear": Place("double_stream_modulation_txt.lin"),
    "single_stream_modulation.linear": Place("single_stream_modulation.lin"),
}
_DOUBLE = DOUBLE | {
    "ff.linear_in": Place("img_mlp.0"),
    "ff.linear_out": Place("img_mlp.2"),
    "ff_context.linear_in": Place("txt_mlp.0"),
    "ff_context.linear_out": Place("txt_mlp.2"),
}
_SINGLE = SINGLE | {"attn.to_qkv_mlp_proj": Place("linear1"), "attn.to_out": Place("linear2")}


def transformer_places(names: Collection[str]) -> Mapping[str, Place]:
    """The places of the weights ``names`` of a transformer."""
    return places(names, _OUTSIDE, _DOUBLE, _SINGLE)


def autoencoder_places(names: Collection[str]) -> Mapping[str, Place]:
    """The places of the weights ``names`` of an AutoencoderKLFlux2, with the statistics of its batch norm."""
    norm = {name: Place(name) for name in names if name.startswith("bn.")}
    return {**_sd3_layout.autoencoder_places(names), **norm}


FLUX2 = SingleFile(transformer_places, autoencoder_places, kohya_module="networks.lora_flux_2")
"""The layout of FLUX.2's checkpoints."""
