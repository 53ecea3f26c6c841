"""Loads a CLIP (Radford et al. 2021, arXiv:2103.00020), and embeds images and texts with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.reward import Scores
from posttrain.rewards import _state
from posttrain.weights.published import Weights

if TYPE_CHECKING:
    from posttrain.reward import Scorer

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_L_WEIGHTS = Weights(
    ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer*.json"), 1_712_766_000, "MIT"
)
MAX_TOKENS = 77
"""Longer texts are cut off. The number includes the tokens that begin and end a text."""


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP in float32; lower precision would add noise to the scores."""

    model: Any
    tokenizer: Any
    device: torch.device

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.model.config.vision_config.image_size

    def of_images(self, pixels: Tensor) -> Tensor:
        """(n, d) projected features, not normalised, of ``pixels`` (n, 3, size, size), preprocessed."""
        return _features(self.model.get_image_features(pixel_values=pixels.to(self.device)))

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """(n, d) projected features, not normalised.

        Padding does not change them: attention is causal, and the feature is taken at the text's last token.
        """
        max_tokens = min(self.model.config.text_config.max_position_embeddings, MAX_TOKENS)
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(self.device)
        return _features(self.model.get_text_features(**tokens))

    def cosine(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """(n,) cosines between the features of each image and of its own text."""
        return torch.nn.functional.cosine_similarity(self.of_images(pixels), self.of_texts(texts))

    def logits(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """(n,) cosines times the model's learned scale."""
        return self.model.logit_scale.exp() * self.cosine(pixels, texts)


def load_clip(weights: Path, processor: Path, device: torch.device) -> Clip:
    """Load the CLIP in the folder ``weights``, with the tokenizer in the folder ``processor``."""
    from transformers import CLIPModel

    return Clip(_state.loaded(CLIPModel, weights, device), load_tokenizer(processor), device)


def load_tokenizer(folder: Path) -> Any:
    """Load the CLIP tokenizer in ``folder``. Raises RewardError."""
    from transformers import CLIPTokenizer

    return _state.load_tokenizer(CLIPTokenizer, folder)


def load_pixels(folder: Path) -> Callable[[Tensor], Tensor]:
    """The preprocessing that the folder's ``preprocessor_config.json`` describes.

    It takes images (n, 3, h, w) in [0, 1], rounds them to 8 bits, and returns (n, 3, size, size).
    """
    from transformers import CLIPImageProcessorPil

    from posttrain.support.images import to_pil

    with _state.reading(folder):
        # AutoImageProcessor would choose by whether torchvision is installed, and the pixels would differ
        processor = CLIPImageProcessorPil.from_pretrained(folder)
    return lambda images: processor(images=to_pil(images), return_tensors="pt")["pixel_values"]


def in_batches(score_batch: Callable[[Tensor, Sequence[str]], Tensor], batch_size: int) -> Scorer:
    """A scorer that calls ``score_batch`` with up to ``batch_size`` images (n, 3, h, w) and their prompts."""

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        del metadata
        batches = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
        with torch.no_grad():
            return Scores(torch.cat([score_batch(images[b], prompts[b]).float().cpu() for b in batches]))

    return score


def _features(output: Any) -> Tensor:
    # transformers 4 returns a tensor, transformers 5 an object around it
    return getattr(output, "pooler_output", output)
