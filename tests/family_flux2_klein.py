"""FLUX.2 klein in the table of families: a base model, which is guided by the empty prompt."""

from families import Family

STEPS = 8
"""Steps of the grid that training follows here: the law compares the sampler's grid of so many."""


def squares(latents):
    """``latents`` (n, c, h, w) as the pipeline's call takes them: (n, 4 c, h / 2, w / 2)."""
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline._patchify_latents(latents)


def pipeline(is_distilled=False):
    """A pipeline of 4 latent channels, of which one stands for 2 x 2 pixels, with a Qwen3 of 28 layers."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16,
        guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=16,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.2)
    # statistics that differ between all places of a square
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.7, 16))
    vae.bn.running_var.copy_(torch.linspace(0.3, 2.0, 16))
    words = tokenizer()
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=28,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=64,
            initializer_range=0.5,
        )
    )  # fmt: skip
    # the published scheduler
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, vae, text, words, transformer, is_distilled)


def tokenizer():
    from pipelines import WORDS

    from posttrain.models._tiny_tokenizers import qwen_tokenizer

    made = qwen_tokenizer([*WORDS, "user", "assistant"], 16)
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    return made


FAMILY = Family(
    type="flux2_klein",
    pipeline=pipeline,
    settings={"max_sequence_length": 16, "grid_steps": STEPS},
    bad_size=(18, 16),
    call=lambda guidance: {"guidance_scale": guidance, "max_sequence_length": 16},
    packed=lambda model, latents: squares(latents),
)
