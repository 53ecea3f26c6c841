"""AuraFlow in the table of families: a pipeline that has no class here, but a mapping."""

from families import Family


def pipeline():
    """A pipeline of 4 latent channels, of which one stands for 2 x 2 pixels."""
    from diffusers import (
        AuraFlowPipeline,
        AuraFlowTransformer2DModel,
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
    )
    from pipelines import WORDS
    from torch.nn.init import normal_
    from transformers import UMT5Config, UMT5EncoderModel

    from posttrain.models._tiny_tokenizers import t5_tokenizer

    tokenizer = t5_tokenizer(WORDS, 16)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=256,
    )  # fmt: skip
    normal_(transformer.proj_out.weight, std=0.2)
    return AuraFlowPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),  # the published one
        vae=AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            sample_size=16, scaling_factor=0.13025,
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        ),
        tokenizer=tokenizer,
    )  # fmt: skip


FAMILY = Family(
    type="diffusers",
    pipeline=pipeline,
    settings={"max_sequence_length": 16},
    call=lambda guidance: {"guidance_scale": guidance, "max_sequence_length": 16},
    lora={"targets": ["attn.to_v", "attn.to_out.0", "attn.to_add_out", "ff.linear_1", "ff.out_projection"]},
)
