"""What do CLIP scorers share: how is a CLIP loaded, and how are images and texts embedded, batch by batch?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.reward import Scores
from posttrain.rewards._state import loaded
from posttrain.weights.published import Weights

if TYPE_CHECKING:
    from posttrain.reward import Scorer

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_L_WEIGHTS = Weights(
    ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer*.json"), 1_712_766_000, "MIT"
)
LONGEST = 77
"""Tokens of a text, the first and the last included; what is longer is cut off."""


@dataclass(frozen=True)
class Clip:
    """A CLIP that scores: frozen, in float32 (a reward's noise should not be the precision's)."""

    model: Any
    tokenizer: Any
    device: torch.device

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size

    def of_images(self, pixels: Tensor) -> Tensor:
        """(n, d) projected features, not normalised, of ``pixels`` as the model wants them."""
        return _features(self.model.get_image_features(pixel_values=pixels.to(self.device)))

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """(n, d) projected features, not normalised. What pads a text cannot change them: CLIP reads from
        left to right, and its feature is that of the text's last token."""
        longest = min(self.model.config.text_config.max_position_embeddings, LONGEST)
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        return _features(self.model.get_text_features(**tokens))

    def cosine(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """(n,): how alike each image and its own text are."""
        return torch.nn.functional.cosine_similarity(self.of_images(pixels), self.of_texts(texts))

    def logits(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """(n,): the cosine times the model's own scale."""
        return self.model.logit_scale.exp() * self.cosine(pixels, texts)


def load_clip(weights: Path, processor: Path, device: torch.device) -> Clip:
    """The CLIP in folder ``weights``, with the tokenizer in folder ``processor``."""
    from transformers import CLIPModel

    return Clip(loaded(CLIPModel, weights, device), load_tokenizer(processor), device)


def load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    from posttrain.weights.hugging_face import quiet

    with quiet():
        return CLIPTokenizer.from_pretrained(folder)


def load_pixels(folder: Path) -> Callable[[Tensor], Tensor]:
    """What the folder's ``preprocessor_config.json`` makes of images (n, 3, h, w) in [0, 1], as 8-bit."""
    from transformers import CLIPImageProcessorPil

    from posttrain.support.images import to_pil
    from posttrain.weights.hugging_face import quiet

    with quiet():
        # by name, so that machines with and without torchvision see the same pixels
        processor = CLIPImageProcessorPil.from_pretrained(folder)
    return lambda images: processor(images=to_pil(images), return_tensors="pt")["pixel_values"]


def in_batches(some: Callable[[Tensor, Sequence[str]], Tensor], size: int) -> Scorer:
    """A scorer that gives ``some`` at most ``size`` images with their prompts at a time."""

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        del metadata
        starts = range(0, len(prompts), size)
        with torch.no_grad():
            parts = [some(images[i : i + size], prompts[i : i + size]).float().cpu() for i in starts]
        return Scores(torch.cat(parts))

    return score


def _features(output: Any) -> Tensor:
    # transformers 5 wraps what 4 returned
    return getattr(output, "pooler_output", output)
