"""FLUX.1 in the table of families: dev, whose guidance is an input of the network."""

from families import Family

from posttrain.models._packing import packed


def pipeline(guidance_embeds=True, **scheduler):
    """A pipeline of 4 latent channels, of which one stands for 2 x 2 pixels, with a T5 of width 32."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from pipelines import WORDS
    from torch.nn.init import normal_
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from posttrain.models import _tiny_tokenizers

    clip, t5 = _tiny_tokenizers.clip_tokenizer(WORDS, 16), _tiny_tokenizers.t5_tokenizer(WORDS, 16)
    # sizes of the tests' images have from 16 to 32 tokens
    dynamic = {"use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 32, "shift": 3.0}
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    normal_(transformer.proj_out.weight, std=0.2)
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or dynamic)),
        vae=AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            sample_size=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159,
            scaling_factor=0.3611,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=16, bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id, initializer_factor=20.0,
            )
        ),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(t5), d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
        ),
        tokenizer_2=t5,
    )  # fmt: skip


FAMILY = Family(
    type="flux",
    pipeline=pipeline,
    settings={"max_sequence_length": 16},
    bad_size=(18, 16),
    call=lambda guidance: {"guidance_scale": guidance, "max_sequence_length": 16},
    packed=lambda model, latents: packed(latents),
)
