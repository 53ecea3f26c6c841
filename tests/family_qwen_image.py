"""Qwen-Image in the table of families."""

import re
from typing import Any

import torch
from families import Family
from pipelines import WORDS

from posttrain.models._packing import packed

TOKENS = 60
"""Tokens that the tokenizer gives at most: the 34 of the template's beginning, and 26."""


def pipeline():
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    absent: dict[str, Any] = {"tokenizer": None, "text_encoder": None}  # the tokenizer needs the template
    made = QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[-0.7, 0.1, 0.9, -0.2],
            latents_std=[2.8, 1.4, 0.7, 1.9],
        ),
        # the published scheduler
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        **absent,
    )
    made.register_modules(tokenizer=tokenizer(made.prompt_template_encode))
    text = {
        "vocab_size": len(made.tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 1,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    made.register_modules(text_encoder=Qwen2_5_VLForConditionalGeneration(config))
    for weight in (made.transformer.proj_out.weight, made.vae.decoder.conv_out.weight):
        torch.nn.init.normal_(weight, std=0.2)
    return made


def tokenizer(template):
    from posttrain.models._tiny_tokenizers import qwen_tokenizer

    words = re.findall("[A-Za-z]+", re.sub(r"<\|.*?\|>", "", template))
    return qwen_tokenizer([*WORDS, *words], TOKENS)


FAMILY = Family(
    type="qwen_image",
    pipeline=pipeline,
    settings={"max_sequence_length": 20},
    guidance=(1.0, 4.0),
    # the model's authors guide with " "
    call=lambda guidance: {
        "true_cfg_scale": guidance,
        "negative_prompt": [" ", " "],
        "max_sequence_length": 20,
    },
    packed=lambda model, latents: packed(latents),
    terminal=0.02,
)
