"""Loads a checkpoint of open_clip into transformers' CLIP.

Both hold the same network. open_clip has query, key and value in one matrix, and its projections are
transposed. All sizes follow from the tensors' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from posttrain.errors import RewardError
from posttrain.rewards._state import all_used, fill, layers

if TYPE_CHECKING:
    from transformers import CLIPModel

TEXT_HEAD_CHANNELS, VISION_HEAD_CHANNELS = 64, 80
"""Channels of an attention head in ViT-H-14's towers. No tensor's shape depends on them."""
VISION, TEXT = "visual.transformer.resblocks.", "transformer.resblocks."


TENSORS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
NORMS = {
    "ln_final.": "text_model.final_layer_norm.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # transformers' spelling
    "visual.ln_post.": "vision_model.post_layernorm.",
}
IN_BLOCK = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
"""open_clip's names of tensors, of norms, and of layers within a block, with those of transformers."""
KINDS = ("weight", "bias")


class Read(dict[str, Tensor]):
    """Weights that remember which of them were read."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__(state)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)


def clip_of(state: Mapping[str, Tensor], file: Path) -> CLIPModel:
    """The CLIP with the open_clip weights ``state``, which were read from ``file``.

    Raises RewardError if they are not a CLIP's.
    """
    from transformers import CLIPConfig, CLIPModel

    read = Read(state)
    try:
        model = CLIPModel(CLIPConfig(**_sizes(state)))
        renamed = _renamed(read)
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise RewardError(f"{str(file)!r} holds no CLIP in open_clip's format: {error}") from error
    all_used(state, read.names, file)
    fill(model, renamed, file)
    return model


def _sizes(state: Mapping[str, Tensor]) -> dict:
    vocabulary, text_width = state["token_embedding.weight"].shape
    vision_width, _, _, patch = state["visual.conv1.weight"].shape
    projection = state["text_projection"].shape[1]
    text = {
        **_tower(state, TEXT, text_width, TEXT_HEAD_CHANNELS),
        "vocab_size": vocabulary,
        "max_position_embeddings": len(state["positional_embedding"]),
        # open_clip takes the text's feature at the highest token id, so the last id must end the text
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "projection_dim": projection,
    }
    vision = {
        **_tower(state, VISION, vision_width, VISION_HEAD_CHANNELS),
        "patch_size": patch,
        "image_size": patch * math.isqrt(len(state["visual.positional_embedding"]) - 1),
        "projection_dim": projection,
    }
    return {"text_config": text, "vision_config": vision, "projection_dim": projection}


def _tower(state: Mapping[str, Tensor], prefix: str, width: int, channels: int) -> dict:
    if width % channels:
        raise ValueError(
            f"a width of {width} is no multiple of {channels}, the channels of an attention head"
        )
    return {
        "hidden_size": width,
        "intermediate_size": len(state[f"{prefix}0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers(state, prefix),
        "num_attention_heads": width // channels,
        "hidden_act": "gelu",
    }


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under transformers' names: attention matrices are split, and projections transposed."""
    renamed = {new: state[old] for old, new in TENSORS.items()}
    renamed |= {new + kind: state[old + kind] for old, new in NORMS.items() for kind in KINDS}
    renamed["text_projection.weight"] = state["text_projection"].T
    renamed["visual_projection.weight"] = state["visual.proj"].T
    for old, new in ((TEXT, "text_model."), (VISION, "vision_model.")):
        for i in range(layers(state, old)):
            renamed |= _renamed_block(state, f"{old}{i}.", f"{new}encoder.layers.{i}.")
    return renamed


def _renamed_block(state: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """One block of a tower; ``old`` and ``new`` are the prefixes of its names."""
    block = {new + b + kind: state[old + a + kind] for a, b in IN_BLOCK.items() for kind in KINDS}
    for kind in KINDS:
        thirds = state[f"{old}attn.in_proj_{kind}"].chunk(3)
        block |= {f"{new}self_attn.{n}_proj.{kind}": t for n, t in zip("qkv", thirds, strict=True)}
    return block
