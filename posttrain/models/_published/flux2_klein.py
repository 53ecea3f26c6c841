"""Holds the configurations of FLUX.2 klein 4B and 9B, base and distilled."""

from __future__ import annotations

from typing import Any

from posttrain.models._published._components import QWEN3_4B, QWEN3_8B, autoencoder

_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 128,
    "attention_head_dim": 128,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": False,
}
_TEXT = {"architectures": ["Qwen3ForCausalLM"]}
_REST: dict[str, dict[str, Any]] = {
    "vae": autoencoder(
        32, use_quant_conv=True, use_post_quant_conv=True, batch_norm_eps=1e-4, patch_size=[2, 2]
    ),
    "scheduler": {"shift": 3.0, "use_dynamic_shifting": True},
}
_4B = {
    **_REST,
    "transformer": {
        **_TRANSFORMER,
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
    },
    "text_encoder": {**_TEXT, **QWEN3_4B},
}
_9B = {
    **_REST,
    "transformer": {
        **_TRANSFORMER,
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
    },
    "text_encoder": {**_TEXT, **QWEN3_8B},
}
_DISTILLED = {"pipeline": {"is_distilled": True}}

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    # the config.json of each folder of these repositories, and is_distilled of their model_index.json
    "black-forest-labs/FLUX.2-klein-base-4B": _4B,
    "black-forest-labs/FLUX.2-klein-4B": {**_4B, **_DISTILLED},
    "black-forest-labs/FLUX.2-klein-base-9B": _9B,
    "black-forest-labs/FLUX.2-klein-9B": {**_9B, **_DISTILLED},
}
_NON_COMMERCIAL = {
    "license": "other",
    "license_name": "flux-non-commercial-license",
    "license_link": "https://huggingface.co/black-forest-labs/FLUX.2-klein-base-9B/blob/main/LICENSE.md",
}
# as in the front matter of their model cards
LICENCES = {name: {"license": "apache-2.0"} if name.endswith("4B") else _NON_COMMERCIAL for name in CONFIGS}
