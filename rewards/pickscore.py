"""PickScore: which image would people prefer for the prompt (Kirstain et al. 2023, arXiv:2305.01569)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.reward import Reward, Scores
from posttrain.weights import Weights

if TYPE_CHECKING:
    from posttrain.reward import Scorer

SCALE = 26
"""By which Flow-GRPO, DiffusionNFT and SOAR divide in training; their tables show the score times it."""


class PickScore(Reward):
    """The scaled cosine of image and prompt under a CLIP ViT-H tuned on people's choices, over 26 (about
    0.86; tables show 26 times that, about 22)."""

    type: Literal["pickscore"] = "pickscore"
    range: ClassVar = (-100 / SCALE, 100 / SCALE)

    weights: ClassVar = {
        "path": Weights(("config.json", "model.safetensors"), 3_944_517_836, "MIT"),
        "processor": Weights(("preprocessor_config.json", "tokenizer*.json"), 3_644_497, "MIT"),
    }

    path: str = "yuvalkirstain/PickScore_v1"
    """Weights: a hub name or a folder."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Tokenizer and image preprocessing: a hub name or a folder."""
    batch_size: int = Field(16, ge=1)

    def load(self, device: torch.device) -> Scorer:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        from posttrain.grids import to_pil
        from posttrain.models._weights import quiet

        processor = self.located("processor")
        with quiet():
            # by name, so that machines with and without torchvision see the same pixels
            pixels_of = CLIPImageProcessorPil.from_pretrained(processor)
            tokenizer = CLIPTokenizer.from_pretrained(processor)
            model: Any = CLIPModel.from_pretrained(self.located("path"), dtype=torch.float32)
        model = model.to(device).eval().requires_grad_(False)
        longest = min(model.config.text_config.max_position_embeddings, 77)

        @torch.no_grad()
        def some(images: Tensor, prompts: Sequence[str]) -> Tensor:
            pixels = pixels_of(images=to_pil(images), return_tensors="pt")["pixel_values"].to(device)
            text = tokenizer(
                list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(device)
            image = model.get_image_features(pixel_values=pixels)
            words = model.get_text_features(**text)
            # transformers 5 wraps what 4 returned
            image, words = (getattr(f, "pooler_output", f) for f in (image, words))
            cosine = torch.nn.functional.cosine_similarity(image, words)
            return (model.logit_scale.exp() * cosine / SCALE).float().cpu()

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            size = self.batch_size
            parts = [some(images[i : i + size], prompts[i : i + size]) for i in range(0, len(prompts), size)]
            return Scores(torch.cat(parts))

        return score
