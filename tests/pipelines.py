"""Small random Stable Diffusion 3 pipelines in the published folder format."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch

WORDS = ["a", "photo", "of", "red", "green", "blue", "circle", "square", "triangle"]


def assert_equal_but_for_rounding(actual, expected):
    """Float32 results of the same computation in another order: errors below 1e-5 of the largest value."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * largest)


@functools.cache
def pipeline_folder(seed=0):
    """A pipeline of about 40 k parameters: 16 px images, 4 latent channels, patch 2, T5 of width 32."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from posttrain.models import _tiny_tokenizers
    from posttrain.weights.hugging_face import quiet

    torch.manual_seed(seed)
    folder = Path(tempfile.mkdtemp(prefix="posttrain-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    clip_tokenizer = _tiny_tokenizers.clip_tokenizer(WORDS, 16)
    t5_tokenizer = _tiny_tokenizers.t5_tokenizer(WORDS, 16)

    def clip():
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=16,
                max_position_embeddings=16,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
                pad_token_id=clip_tokenizer.pad_token_id,
                initializer_factor=20.0,
            )
        )

    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0609,
            scaling_factor=1.5305,
        ),
        text_encoder=clip(),
        tokenizer=clip_tokenizer,
        text_encoder_2=clip(),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=T5EncoderModel(
            T5Config(vocab_size=len(t5_tokenizer), d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
        ),
        tokenizer_3=t5_tokenizer,
    )
    # zero-initialised output layers would make every velocity 0 and every test blind
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.2)
    with quiet():
        pipeline.save_pretrained(folder)
    return folder


def load(folder=None, **settings):
    from posttrain.models.sd3 import SD3

    spec = SD3(path=str(folder or pipeline_folder()), max_sequence_length=16, **settings)
    return spec.load(torch.device("cpu"), "fp32")
