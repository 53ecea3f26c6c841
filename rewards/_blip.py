"""How does ImageReward's checkpoint become transformers' BLIP, a text tower that reads a vision tower?

transformers names the vision tower's parts otherwise, the text tower's the same. The sizes are read off the
tensors.
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
from posttrain.rewards._state import fill, frozen, layers, linear_head

if TYPE_CHECKING:
    import torch

HEAD = 64
"""Channels of an attention head in both towers, which no tensor's shape tells."""
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
"""Patterns of the vision tower's names, and what transformers has for them."""


@dataclass(frozen=True)
class Blip:
    """ImageReward's network: frozen, in float32."""

    vision: Any
    text: Any
    head: nn.Module

    @property
    def image_size(self) -> int:
        return self.vision.config.image_size

    @property
    def vocabulary(self) -> int:
        return self.text.config.vocab_size

    def __call__(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(n,): the head's value of each text that has read its own image."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        return self.head(read[:, 0]).squeeze(1)


def blip_of(state: Mapping[str, Tensor], file: Path, device: torch.device) -> Blip:
    """The network whose weights are ``state``, read from ``file``. Raises RewardError where they are not
    those of one."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision_state, text_state = _below(state, "blip.visual_encoder."), _below(state, "blip.text_encoder.")
    text_state.pop("embeddings.position_ids", None)  # 0, 1, 2 and so on: no weights
    try:
        vision: Any = BlipVisionModel(BlipVisionConfig(**_vision_sizes(vision_state)))
        # of a decoder's kind, so that it is built with the layers that read the image
        sizes = {**_text_sizes(text_state), "encoder_hidden_size": vision.config.hidden_size}
        text: Any = BlipTextModel(BlipTextConfig(**sizes, is_decoder=True), add_pooling_layer=False)
    except (KeyError, ValueError) as error:
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
    if width % HEAD:
        raise ValueError(f"a width of {width} is no multiple of {HEAD}, the channels of an attention head")
    return width // HEAD


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def _renamed(name: str) -> str:
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name
