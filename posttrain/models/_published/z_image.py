"""Holds the configurations of Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from typing import Any

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
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {
        "architectures": ["Qwen3Model"],  # as model_index.json loads it; its own file has Qwen3ForCausalLM
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "eos_token_id": 151645,
        "tie_word_embeddings": True,
    },
}

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    # the config.json of each folder of huggingface.co/Tongyi-MAI/Z-Image and /Z-Image-Turbo
    "Tongyi-MAI/Z-Image": {**_COMPONENTS, "scheduler": {"shift": 6.0}},
    "Tongyi-MAI/Z-Image-Turbo": {**_COMPONENTS, "scheduler": {"shift": 3.0}},
}

# the model cards: huggingface.co/Tongyi-MAI/Z-Image and /Z-Image-Turbo
LICENCES = {model: {"license": "apache-2.0"} for model in CONFIGS}
