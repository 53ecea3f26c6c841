"""Lumina-Image 2.0 in the table of families: a pipeline that has no class here, but a mapping."""

import re

from families import Family

LENGTH = 64


def pipeline():
    """A pipeline of 4 latent channels, of which one stands for 8 x 8 pixels, as the pipeline demands."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        Lumina2Pipeline,
        Lumina2Transformer2DModel,
    )
    from pipelines import WORDS
    from torch.nn.init import normal_
    from transformers import Gemma2Config, Gemma2Model

    from posttrain.models._tiny_tokenizers import t5_tokenizer

    tokenizer = t5_tokenizer([*WORDS, *re.findall(r"\w+", SYSTEM_PROMPT), "Prompt", "Start"], LENGTH)
    transformer = Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=4, axes_dim_rope=(4, 2, 2), axes_lens=(80, 16, 16), cap_feat_dim=16,
    )  # fmt: skip
    normal_(transformer.norm_out.linear_2.weight, std=0.2)
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),  # the published one
        vae=AutoencoderKL(
            block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            sample_size=32, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159,
            scaling_factor=0.3611,
        ),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
                initializer_range=0.5,
            )
        ),
        tokenizer=tokenizer,
    )  # fmt: skip


SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image text alignment "
    "based on textual prompts or user prompts"
)

FAMILY = Family(
    type="diffusers",
    pipeline=pipeline,
    settings={"max_sequence_length": LENGTH},
    sizes=((32, 32), (64, 32)),
    bad_size=(24, 32),
    guidance=(1.0, 4.0),
    call=lambda guidance: {"guidance_scale": guidance, "max_sequence_length": LENGTH},
    lora={"targets": ["to_q", "to_k", "to_v", "to_out.0"]},
)
