"""Holds the configurations of Stable Diffusion 3.5."""

from __future__ import annotations

from typing import Any

_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}

_SHARED: dict[str, dict[str, Any]] = {
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {
        **_CLIP,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "text_encoder_2": {
        **_CLIP,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    "text_encoder_3": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "scheduler": {"shift": 3.0},
}
_LARGE = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
# the config.json of each folder of huggingface.co/stabilityai/stable-diffusion-3.5-medium and -large; the
# autoencoder, the text encoders and the shift are the same
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "stabilityai/stable-diffusion-3.5-medium": {
        "transformer": {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
        **_SHARED,
    },
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
