"""Z-Image in the table of families."""

from families import Family
from pipelines import WORDS

LENGTH = 44
"""Tokens of a prompt: more than the 32 to a multiple of which the transformer fills it up."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pipeline(**scheduler):
    """A pipeline of 4 latent channels, of which one stands for 2 x 2 pixels."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from torch.nn.init import normal_
    from transformers import Qwen3Config, Qwen3Model

    from posttrain.models._tiny_tokenizers import qwen_tokenizer

    tokenizer = qwen_tokenizer([*WORDS, "user", "assistant"], 100)
    tokenizer.chat_template = TEMPLATE
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 2, 2], axes_lens=[80, 16, 16],
    )  # fmt: skip
    for weight in (transformer.x_pad_token, transformer.cap_pad_token):
        normal_(weight, std=0.5)  # they start at 0
    normal_(transformer.all_final_layer["2-1"].linear.weight, std=0.2)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or {"shift": 6.0})),  # Z-Image's
        vae=AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            sample_size=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159,
            scaling_factor=0.3611,
        ),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
                initializer_range=0.5,
            )
        ),
        tokenizer=tokenizer,
    )  # fmt: skip


FAMILY = Family(
    type="z_image",
    pipeline=pipeline,
    settings={"max_sequence_length": LENGTH},
    bad_size=(18, 16),
    guidance=(0.0, 1.0, 4.0),
    call=lambda guidance: {"guidance_scale": guidance, "max_sequence_length": LENGTH},
    lora={"targets": ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]},
)
