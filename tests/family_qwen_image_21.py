"""Qwen-Image 2.1 in the table of families."""

import json
import re
from pathlib import Path

import torch
from families import Family
from pipelines import WORDS

LENGTH = 20
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def pipeline(**index):
    """A pipeline of 4 latent channels. Its class writes a folder without a processor for images, which
    needs torchvision."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from posttrain.weights.text_processor import text_processor

    class Tiny(QwenImage21Pipeline):
        def save_pretrained(self, folder):
            classes = {"processor": ["transformers", "Qwen3VLProcessor"]}
            self.processor.tokenizer.save_pretrained(folder / "processor")
            for name in ("scheduler", "text_encoder", "transformer", "vae"):
                (part := getattr(self, name)).save_pretrained(folder / name)
                classes[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
            text = json.dumps({"_class_name": "QwenImage21Pipeline", **classes, **index})
            Path(folder, "model_index.json").write_text(text, "utf-8")

    known = tokenizer()
    text = {
        "vocab_size": len(known),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 1,
        "out_hidden_size": 16,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [0],
    }
    made = Tiny(
        transformer=QwenImage21Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            context_in_dim=16, axes_dims_rope=(4, 6, 6),
        ),
        vae=AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 2, 2, 2], num_res_blocks=1,
            latents_mean=[-0.7, 0.1, 0.9, -0.2], latents_std=[2.8, 1.4, 0.7, 1.9],
        ),
        # the published scheduler
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
            max_image_seq_len=8192, shift_terminal=0.02,
        ),
        text_encoder=Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)),
        processor=text_processor(known),
    )  # fmt: skip
    for weight in (made.transformer.proj_out.weight, made.vae.decoder.conv_out.weight):
        torch.nn.init.normal_(weight, std=0.2)
    return made


def tokenizer():
    from posttrain.models._tiny_tokenizers import qwen_tokenizer

    words = re.findall("[A-Za-z]+", "Comprehend and analyze the provided prompt system user assistant")
    made = qwen_tokenizer([*WORDS, *words], 60)
    made.chat_template = CHAT
    return made


def processor(folder):
    from posttrain.weights.text_processor import load_text_processor

    return {"processor": load_text_processor(Path(folder) / "processor")}


FAMILY = Family(
    type="qwen_image_21",
    pipeline=pipeline,
    settings={"max_sequence_length": LENGTH},
    sizes=((64, 64), (64, 32)),
    bad_size=(48, 32),
    guidance=(1.0, 4.0),
    call=lambda guidance: {"true_cfg_scale": guidance, "negative_prompt": " "},
    packed=lambda model, latents: latents.flatten(2).transpose(1, 2),
    alone=True,
    parts=processor,
    terminal=0.02,
)
