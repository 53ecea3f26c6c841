"""Holds the configurations of SANA and SANA 1.5."""

from __future__ import annotations

from typing import Any

_LEVELS: dict[str, Any] = {
    "block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "qkv_multiscales": [[], [], [], [5], [5], [5]],
}
# dc-ae-f32c32-sana-1.0, as in diffusers' scripts/convert_dcae_to_diffusers.py
_AUTOENCODER: dict[str, Any] = {
    **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _LEVELS.items()},
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "latent_channels": 32,
    "attention_head_dim": 32,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
# google/gemma-2-2b-it; these are transformers' defaults
_GEMMA = {
    "architectures": ["Gemma2Model"],
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "eos_token_id": 1,
}
# 1.6B: heads of self-attention, their width, and the same of cross-attention
_LARGE = {
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
}
_SMALL = {
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}


def _pipeline(side: int, layers: int, widths: dict[str, Any], **more: Any) -> dict[str, dict[str, Any]]:
    """The configurations of a pipeline for images of ``side`` pixels."""
    return {
        "transformer": {
            "in_channels": 32,
            "out_channels": 32,
            "num_layers": layers,
            **widths,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
            "attention_bias": False,
            "sample_size": side // 32,
            "patch_size": 1,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            **more,
        },
        "vae": _AUTOENCODER,
        "text_encoder": _GEMMA,
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
            "prediction_type": "flow_prediction",
        },
    }


_NORMED = {"qk_norm": "rms_norm_across_heads"}
# the transformers and the scheduler are those of diffusers' scripts/convert_sana_to_diffusers.py, which made
# the folders that NVlabs/Sana's model zoo (asset/docs/model_zoo.md) lists
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "Efficient-Large-Model/Sana_600M_512px_diffusers": _pipeline(512, 28, _SMALL),
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": _pipeline(1024, 28, _SMALL),
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": _pipeline(512, 20, _LARGE),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": _pipeline(1024, 20, _LARGE),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": _pipeline(1024, 20, _LARGE),
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": _pipeline(1024, 20, _LARGE, **_NORMED),
    "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": _pipeline(1024, 60, _LARGE, **_NORMED),
}

# as the model cards of these repositories say, which add Gemma's terms of use for the text encoder
_REPOSITORY = "https://huggingface.co/Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
_LICENCE = {
    "license": "other",
    "license_name": "nscl-v2-custom",
    "license_link": f"{_REPOSITORY}/blob/main/LICENSE.txt",
}
LICENCES = dict.fromkeys(CONFIGS, _LICENCE)
