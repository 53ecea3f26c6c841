"""PickScore: which image would people prefer for the prompt (Kirstain et al. 2023, arXiv:2305.01569)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.errors import RewardError
from posttrain.reward import Reward, Scores

if TYPE_CHECKING:
    from posttrain.reward import Scorer

SCALE = 26
"""By which Flow-GRPO, DiffusionNFT and SOAR divide in training; their tables show the score times it."""


class PickScore(Reward):
    """The scaled cosine of image and prompt under a CLIP ViT-H tuned on people's choices, over 26 (about
    0.86; tables show 26 times that, about 22)."""

    type: Literal["pickscore"] = "pickscore"
    range: ClassVar = (-100 / SCALE, 100 / SCALE)

    path: str = "yuvalkirstain/PickScore_v1"
    """Weights: a hub name or a folder."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Tokenizer and image preprocessing: a hub name or a folder."""
    batch_size: int = Field(16, ge=1)

    def problem(self) -> str | None:
        for name in ("path", "processor"):
            folder = Path(getattr(self, name)).expanduser()
            if str(folder).startswith((".", "/")) and not folder.is_dir():
                return f"{name}: no folder {str(folder)!r}"
        return super().problem()

    def load(self, device: torch.device) -> Scorer:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        from posttrain.grids import to_pil
        from posttrain.models._weights import quiet

        try:
            with quiet():
                # by name, so that machines with and without torchvision see the same pixels
                pixels_of = CLIPImageProcessorPil.from_pretrained(self.processor)
                tokenizer = CLIPTokenizer.from_pretrained(self.processor)
                model: Any = CLIPModel.from_pretrained(self.path, dtype=torch.float32)
        except OSError as error:
            raise RewardError(
                f"pickscore: cannot load {self.path!r} with the processor {self.processor!r}: "
                f"{str(error).splitlines()[0]}. Give local folders as 'path' and 'processor'"
            ) from error
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
