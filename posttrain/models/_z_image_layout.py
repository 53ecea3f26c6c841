"""Names Z-Image's weights as its authors' checkpoints do, which ComfyUI loads.

diffusers reads them by ``convert_z_image_transformer_checkpoint_to_diffusers``; here is the inverse. In the
one file of a checkpoint for ComfyUI the transformer's names begin with ``model.diffusion_model.`` and the
autoencoder's with ``vae.`` (``vae_key_prefix`` of ``Lumina2`` in ComfyUI's ``comfy/supported_models.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from posttrain.models._sd3_layout import autoencoder_places
from posttrain.weights.single_file import Place, SingleFile, renamed

_RENAMED = {
    "attention.to_out.0": "attention.out",
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
}
_QKV = {"attention.to_q": 0, "attention.to_k": 1, "attention.to_v": 2}


def transformer_places(names: Collection[str]) -> Mapping[str, Place]:
    """The places of the weights ``names`` of a transformer."""
    return renamed(names, _place_of)


def _place_of(layer: str) -> Place | None:
    for name in ("x_embedder", "final_layer"):
        if layer.startswith(f"all_{name}.2-1"):
            return Place(name + layer.removeprefix(f"all_{name}.2-1"))
    parts = layer.split(".", 2)
    if parts[0] not in ("layers", "noise_refiner", "context_refiner"):
        return Place(layer)
    block, inner = ".".join(parts[:2]), parts[2]
    if inner in _QKV:
        return Place(f"{block}.attention.qkv", _QKV[inner], 3)
    return Place(f"{block}.{_RENAMED.get(inner, inner)}")


Z_IMAGE = SingleFile(
    transformer_places,
    autoencoder_places,
    kohya_module="networks.lora_zimage",  # that of musubi-tuner, by the author of kohya's scripts
)
"""The layout of Z-Image's checkpoints."""
