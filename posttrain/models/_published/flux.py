"""Holds the configurations of FLUX.1 dev and schnell."""

from __future__ import annotations

from typing import Any

from posttrain.models._published._components import CLIP_L, FLUX_AUTOENCODER, T5_XXL

_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}
_REST: dict[str, dict[str, Any]] = {
    "vae": FLUX_AUTOENCODER,
    "text_encoder": CLIP_L,
    "text_encoder_2": T5_XXL,
}

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    # the config.json of each folder of huggingface.co/black-forest-labs/FLUX.1-dev
    "black-forest-labs/FLUX.1-dev": {
        **_REST,
        "transformer": {**_TRANSFORMER, "guidance_embeds": True},
        "scheduler": {
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "base_shift": 0.5,
            "max_shift": 1.15,
        },
    },
    # the same of huggingface.co/black-forest-labs/FLUX.1-schnell
    "black-forest-labs/FLUX.1-schnell": {
        **_REST,
        "transformer": {**_TRANSFORMER, "guidance_embeds": False},
        "scheduler": {"shift": 1.0},
    },
}

# as in the front matter of their model cards
LICENCES: dict[str, dict[str, str]] = {
    "black-forest-labs/FLUX.1-dev": {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    },
    "black-forest-labs/FLUX.1-schnell": {"license": "apache-2.0"},
}
