"""Loads ImageReward's checkpoint (Xu et al. 2023, arXiv:2304.05977) into transformers' BLIP.

BLIP is a text tower that attends to the output of a vision tower. The checkpoint names the text tower's
weights as transformers does, and the vision tower's differently. All sizes follow from the tensors' shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from posttrain.errors import RewardError
from posttrain.rewards._state import all_used, fill, frozen, layers, linear_head

if TYPE_CHECKING:
    import torch

HEAD_CHANNELS = 64
"""Channels of an attention head in both towers. No tensor's shape depends on it."""
PARTS = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
"""Prefixes of the weights that score."""
UNUSED = ("blip.vision_proj.", "blip.text_proj.")
"""Prefixes of BLIP's contrastive projections, which the checkpoint has and the score has no use for."""
NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
)
"""Patterns in the vision tower's names, and their replacements in transformers."""


@dataclass(frozen=True)
class Blip:
    """ImageReward's network, frozen and in float32."""

    vision: Any
    text: Any
    head: nn.Module

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.vision.config.image_size

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the text tower knows."""
        return self.text.config.vocab_size

    def __call__(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(n,): the head's values for images (n, 3, size, size) and texts, ``ids`` and ``mask`` (n, t)."""
        image_states = self.vision(pixel_values=pixels).last_hidden_state
        text_states = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=image_states, is_decoder=False
        ).last_hidden_state
        return self.head(text_states[:, 0]).squeeze(1)


def blip_of(state: Mapping[str, Tensor], file: Path, device: torch.device) -> Blip:
    """The network with the weights ``state``, which were read from ``file``.

    Raises RewardError if they are not ImageReward's.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    all_used(state, (name for name in state if name.startswith(PARTS + UNUSED)), file)
    vision_state, text_state = _below(state, "blip.visual_encoder."), _below(state, "blip.text_encoder.")
    try:
        vision: Any = BlipVisionModel(BlipVisionConfig(**_vision_sizes(vision_state)))
        # only a decoder is built with the layers that attend to the image
        sizes = {**_text_sizes(text_state), "encoder_hidden_size": vision.config.hidden_size}
        text: Any = BlipTextModel(BlipTextConfig(**sizes, is_decoder=True), add_pooling_layer=False)
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise RewardError(f"{str(file)!r} holds no ImageReward: {error}") from error
    fill(vision, {_renamed(name): tensor for name, tensor in vision_state.items()}, file)
    fill(text, text_state, file)
    head = linear_head(_below(state, "mlp."), text.config.hidden_size, file)
    return Blip(frozen(vision, device), frozen(text, device), frozen(head, device))


def _vision_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]),
        "num_hidden_layers": layers(state, "blocks."),
        "num_attention_heads": _heads(width),
        "patch_size": patch,
        "image_size": patch * math.isqrt(state["pos_embed"].shape[1] - 1),
        "layer_norm_eps": 1e-6,
    }


def _text_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": len(state["encoder.layer.0.intermediate.dense.weight"]),
        "num_hidden_layers": layers(state, "encoder.layer."),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": len(state["embeddings.position_embeddings.weight"]),
        "layer_norm_eps": 1e-12,
    }


def _heads(width: int) -> int:
    if width % HEAD_CHANNELS:
        raise ValueError(
            f"a width of {width} is no multiple of {HEAD_CHANNELS}, the channels of an attention head"
        )
    return width // HEAD_CHANNELS


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def _renamed(name: str) -> str:
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name
