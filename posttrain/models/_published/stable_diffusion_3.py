"""Holds the configurations of Stable Diffusion 3.5."""

from __future__ import annotations

from typing import Any

from posttrain.models._published._components import CLIP, CLIP_L, T5_XXL, autoencoder

_SHARED: dict[str, dict[str, Any]] = {
    "vae": autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609),
    "text_encoder": CLIP_L,
    "text_encoder_2": {
        **CLIP,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    "text_encoder_3": T5_XXL,
    "scheduler": {"shift": 3.0},
}
_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_MEDIUM = {
    **_TRANSFORMER,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
_LARGE = {
    **_TRANSFORMER,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
# the config.json of each folder of huggingface.co/stabilityai/stable-diffusion-3.5-medium and -large; the
# autoencoder, the text encoders and the shift are the same
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "stabilityai/stable-diffusion-3.5-medium": {"transformer": _MEDIUM, **_SHARED},
    "stabilityai/stable-diffusion-3.5-large": {"transformer": _LARGE, **_SHARED},
    "stabilityai/stable-diffusion-3.5-large-turbo": {"transformer": _LARGE, **_SHARED},
}

# source: the front matter of huggingface.co/MODEL/blob/main/README.md, of -medium in the commit 4ab6c33;
# there the link is LICENSE.md, a file beside the card
LICENCES = {
    model: {
        "license": "other",
        "license_name": "stabilityai-ai-community",
        "license_link": f"https://huggingface.co/{model}/blob/main/LICENSE.md",
    }
    for model in CONFIGS
}
