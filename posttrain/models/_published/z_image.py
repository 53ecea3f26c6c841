"""Holds the configurations of Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from typing import Any

from posttrain.models._published._components import FLUX_AUTOENCODER, QWEN3_4B

_COMPONENTS: dict[str, dict[str, Any]] = {
    "transformer": {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": 2560,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    },
    "vae": FLUX_AUTOENCODER,
    # as model_index.json loads it; its own file has Qwen3ForCausalLM
    "text_encoder": {"architectures": ["Qwen3Model"], **QWEN3_4B},
}

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    # the config.json of each folder of huggingface.co/Tongyi-MAI/Z-Image and /Z-Image-Turbo
    "Tongyi-MAI/Z-Image": {**_COMPONENTS, "scheduler": {"shift": 6.0}},
    "Tongyi-MAI/Z-Image-Turbo": {**_COMPONENTS, "scheduler": {"shift": 3.0}},
}

# the model cards: huggingface.co/Tongyi-MAI/Z-Image and /Z-Image-Turbo
LICENCES = {model: {"license": "apache-2.0"} for model in CONFIGS}
