"""SANA in the table of families."""

import string

from families import Family

INSTRUCTION = ["draw it", "prompt: "]


def tokenizer():
    """Gemma's tokenizer with one token for each character, after the one for the beginning."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, "▁", "\n", *string.ascii_lowercase, *string.digits, *".,:;'-"]
    made = GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokens.index("<bos>"))]
    )
    return made


def pipeline():
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model

    words = tokenizer()
    encoder = Gemma2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        max_position_embeddings=256,
    )
    levels = {"block_out_channels": (8, 16, 16), "layers_per_block": (1, 1, 1)}
    levels |= {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "qkv_multiscales": ((), (), (5,)),
    }
    return SanaPipeline(
        tokenizer=words,
        text_encoder=Gemma2Model(encoder),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
            scaling_factor=0.41407,
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in levels.items()},
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        ),
        # the settings of the published pipelines
        scheduler=DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    )


def call(guidance):
    return {
        "guidance_scale": guidance,
        "max_sequence_length": 24,
        "complex_human_instruction": INSTRUCTION,
        "use_resolution_binning": False,
    }


def euler(pipeline, steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {"sigmas": [1 - i / steps for i in range(steps)]}


FAMILY = Family(
    type="sana",
    pipeline=pipeline,
    settings={"max_sequence_length": 24, "complex_human_instruction": INSTRUCTION},
    sizes=((32, 32), (64, 32)),
    bad_size=(30, 32),
    call=call,
    euler=euler,
)
