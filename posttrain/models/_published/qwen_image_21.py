"""Holds the configurations of Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

from posttrain.models._published._components import QWEN3_8B_LAYERS
from posttrain.models._published.qwen_image import SCHEDULER

_QWEN_IMAGE_21: dict[str, dict[str, Any]] = {
    "transformer": {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": 64,
        "num_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 32,
        "context_in_dim": 4096,
        "mlp_ratio": 3,
        "axes_dims_rope": [16, 56, 56],
        "eps": 1e-6,
        "causal_condition": True,
    },
    # the means and deviations of the 64 latents are diffusers' defaults
    "vae": {
        "_class_name": "AutoencoderKLQwenImage21",
        "base_dim": 96,
        "decoder_base_dim": 144,
        "z_dim": 64,
        "dim_mult": [1, 2, 4, 8, 8],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True, True],
        "is_residual": True,
        "in_channels": 4,
        "out_channels": 4,
    },
    # that of Qwen3-VL-8B-Instruct
    "text_encoder": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": {
            **QWEN3_8B_LAYERS,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
    "scheduler": SCHEDULER,
}

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    # as diffusers' classes have them by default, and as copies of the repository's config.json files have all
    # of these; Turbo, the same network, has files of the bytes of so many weights
    "Qwen/Qwen-Image-2.1": _QWEN_IMAGE_21,
}

# "licensed under the Qwen Research License Agreement": github.com/QwenLM/Qwen-Image-2.1
LICENCES = {
    model: {
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "https://huggingface.co/Qwen/Qwen-Image-2.1/blob/main/LICENSE",
    }
    for model in CONFIGS
}
