"""Holds the configurations of components that several published models share."""

from __future__ import annotations

from typing import Any


def autoencoder(channels: int, **more: Any) -> dict[str, Any]:
    """The configuration of an AutoencoderKL with so many ``channels`` of latents of 8 x 8 pixels."""
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **more,
    }


# that of FLUX.1 and Z-Image
FLUX_AUTOENCODER = autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159)

CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
CLIP_L = {
    **CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}

_QWEN3 = {
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
}
_CHAT = {"max_position_embeddings": 40960, "rope_theta": 1000000, "eos_token_id": 151645}
# the text model of Qwen3-VL-8B too
QWEN3_8B_LAYERS = {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288}
QWEN3_8B = {**QWEN3_8B_LAYERS, **_CHAT, "tie_word_embeddings": False}
QWEN3_4B = {**_QWEN3, **_CHAT, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
