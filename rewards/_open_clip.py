"""How does a checkpoint of open_clip become transformers' CLIP?

The two hold the same network: open_clip keeps query, key and value in one matrix and multiplies by its
projections from the other side. The sizes are read off the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from posttrain.errors import RewardError
from posttrain.rewards._state import fill, layers

if TYPE_CHECKING:
    from transformers import CLIPModel

TEXT_HEAD, VISION_HEAD = 64, 80
"""Channels of an attention head in ViT-H-14's towers, which no tensor's shape tells."""
VISION, TEXT = "visual.transformer.resblocks.", "transformer.resblocks."


def clip_of(state: Mapping[str, Tensor], file: Path) -> CLIPModel:
    """The CLIP whose open_clip weights are ``state``, read from ``file``. Raises RewardError where they are
    not those of one."""
    from transformers import CLIPConfig, CLIPModel

    try:
        model = CLIPModel(CLIPConfig(**_sizes(state)))
        renamed = _renamed(state)
    except (KeyError, IndexError, ValueError) as error:
        raise RewardError(f"{str(file)!r} holds no CLIP in open_clip's format: {error}") from error
    fill(model, renamed, file)
    return model


def _sizes(state: Mapping[str, Tensor]) -> dict:
    vocabulary, text_width = state["token_embedding.weight"].shape
    vision_width, _, _, patch = state["visual.conv1.weight"].shape
    projection = state["text_projection"].shape[1]
    text = {
        **_tower(state, TEXT, text_width, TEXT_HEAD),
        "vocab_size": vocabulary,
        "max_position_embeddings": len(state["positional_embedding"]),
        # open_clip takes the feature where the id is highest, which is where the text ends
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "projection_dim": projection,
    }
    vision = {
        **_tower(state, VISION, vision_width, VISION_HEAD),
        "patch_size": patch,
        "image_size": patch * math.isqrt(len(state["visual.positional_embedding"]) - 1),
        "projection_dim": projection,
    }
    return {"text_config": text, "vision_config": vision, "projection_dim": projection}


def _tower(state: Mapping[str, Tensor], prefix: str, width: int, head: int) -> dict:
    if width % head:
        raise ValueError(f"a width of {width} is no multiple of {head}, the channels of an attention head")
    return {
        "hidden_size": width,
        "intermediate_size": len(state[f"{prefix}0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers(state, prefix),
        "num_attention_heads": width // head,
        "hidden_act": "gelu",
    }


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    text, vision = "text_model.", "vision_model."
    whole = {
        "logit_scale": "logit_scale",
        "token_embedding.weight": text + "embeddings.token_embedding.weight",
        "positional_embedding": text + "embeddings.position_embedding.weight",
        "visual.class_embedding": vision + "embeddings.class_embedding",
        "visual.conv1.weight": vision + "embeddings.patch_embedding.weight",
        "visual.positional_embedding": vision + "embeddings.position_embedding.weight",
    }
    norms = {
        "ln_final.": text + "final_layer_norm.",
        "visual.ln_pre.": vision + "pre_layrnorm.",  # as transformers spells it
        "visual.ln_post.": vision + "post_layernorm.",
    }
    parts = {
        "attn.out_proj.": "self_attn.out_proj.",
        "ln_1.": "layer_norm1.",
        "ln_2.": "layer_norm2.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    }
    for old, new in ((TEXT, text), (VISION, vision)):
        for i in range(layers(state, old)):
            norms |= {f"{old}{i}.{a}": f"{new}encoder.layers.{i}.{b}" for a, b in parts.items()}
    renamed = {new: state[old] for old, new in whole.items()}
    renamed |= {b + part: state[a + part] for a, b in norms.items() for part in ("weight", "bias")}
    renamed["text_projection.weight"] = state["text_projection"].T
    renamed["visual_projection.weight"] = state["visual.proj"].T
    for old, new in ((TEXT, text), (VISION, vision)):
        for i in range(layers(state, old)):
            for part in ("weight", "bias"):
                three = state[f"{old}{i}.attn.in_proj_{part}"].chunk(3)
                attention = f"{new}encoder.layers.{i}.self_attn."
                renamed |= {f"{attention}{n}_proj.{part}": t for n, t in zip("qkv", three, strict=True)}
    return renamed
